"""Several ranks of ``mx.distributed`` over loopback: starting them, and what each of them does.

``run`` starts the file itself once for each rank, as ``mlx.launch`` would, and returns what each has
answered. ``alone`` does the same in this process, with the whole model.
"""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time

HERE = os.path.abspath(__file__)
LIMIT = 120  # seconds, after which ranks that wait for each other for ever are ended


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


class Ranks:
    """Processes, one for each rank, which are ended with this context.

    Args:
        arguments: Of the program, for each rank.
    """

    def __init__(self, *arguments: list[str], environment=None):
        self._folder = tempfile.TemporaryDirectory()
        hostfile = os.path.join(self._folder.name, "hosts.json")
        with open(hostfile, "w") as file:
            json.dump([[f"127.0.0.1:{port}"] for port in free_ports(len(arguments))], file)
        self._logs, self.processes = [], []
        for rank, given in enumerate(arguments):
            told = {"MLX_RANK": str(rank), "MLX_HOSTFILE": hostfile, "OPENBLAS_NUM_THREADS": "1"}
            log = open(os.path.join(self._folder.name, f"log {rank}"), "w+")
            self._logs.append(log)
            self.processes.append(
                subprocess.Popen(
                    [sys.executable, *given],
                    env={**os.environ, **told, **(environment or {})},
                    stdout=log,
                    stderr=log,
                )
            )

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait()
        for log in self._logs:
            log.close()
        self._folder.cleanup()

    def wait(self, limit: float = LIMIT) -> list[int | None]:
        """Exit codes; None of a rank that has not come to its end."""
        end = time.monotonic() + limit
        for process in self.processes:
            try:
                process.wait(max(0.01, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                pass
        return [process.poll() for process in self.processes]

    def output(self, rank: int) -> str:
        with open(self._logs[rank].name) as file:
            return file.read()

    def outputs(self) -> str:
        return "\n".join(f"--- rank {i}\n{self.output(i)}" for i in range(len(self.processes)))


def run(scenario: str, *options: dict, limit: float = LIMIT) -> list:
    """What each rank answers to a scenario, with ``options`` of its own."""
    arguments = [[HERE, scenario, json.dumps(each)] for each in options]
    with Ranks(*arguments) as ranks:
        codes = ranks.wait(limit)
        if any(codes) or None in codes:
            raise AssertionError(f"exit codes {codes}\n{ranks.outputs()}")
        return [_answer(ranks.output(i)) for i in range(len(options))]


def _answer(output: str):
    lines = [line for line in output.splitlines() if line.startswith("ANSWER ")]
    return json.loads(lines[-1].removeprefix("ANSWER "))


def alone(scenario: str, **options):
    """What one process answers."""
    return SCENARIOS[scenario](**{**options, "how": None})


# What a rank does


def made(family: str, how: str | None, late=False, config=None, room=None, **enabled):
    """A model and its PagedModel.

    Args:
        how: "tp" is sharded, "pp" a pipeline, None whole.
        late: Shared only after ``enable``.
        room: Pages that this machine has room for before it evicts cached ones.
    """
    import mlx.core as mx
    import mlx_lm_zoo as zoo
    from paged_mlx.mlx_lm import enable

    if room is not None:
        module = sys.modules[enable.__module__]
        module.FIRST_PAGES = module.PAGES_BEFORE_EVICTION = room
    model = zoo.tiny(family, **(config or {}))
    paged = enable(model, page_size=8, **enabled) if late else None
    if how == "tp":
        model.shard(mx.distributed.init())
    elif how == "pp":
        getattr(model, "language_model", model).model.pipeline(mx.distributed.init())
    mx.eval(model.parameters())
    return model, paged or enable(model, page_size=8, **enabled)


def traffic(requests=6, seed=0) -> list[list[int]]:
    """Prompts of which many begin alike."""
    import mlx_lm_zoo as zoo

    systems = [zoo.prompt(40, seed=100 + seed + i) for i in range(3)]
    return [systems[i % 3] + zoo.prompt(5 + 7 * (i % 4), seed=seed + i) for i in range(requests)]


def serve(family, how, max_tokens=6, requests=6, **options):
    """Prompts one after the other, then in a ragged batch that some join late, then once more."""
    import mlx_lm_zoo as zoo

    model, paged = made(family, how, **options)
    prompts = traffic(requests)
    answers = [zoo.single(model, tokens, max_tokens) for tokens in prompts]
    lengths = [max_tokens + i % 3 for i in range(requests)]
    answers += zoo.batched(model, prompts, lengths, late={1: 2, requests - 1: 4})
    answers += [zoo.single(model, tokens, max_tokens) for tokens in traffic(requests, seed=50)]
    answers += [zoo.single(model, prompts[0], max_tokens)]
    paged.check()
    reused = paged.prefixes.tokens_reused if paged.prefixes is not None else 0
    return {"answers": answers, "reused": reused, "gathered": paged.gathered_calls}


def again(family, how, **options):
    """Three prompts, the first of them again, and all in a batch."""
    import mlx_lm_zoo as zoo

    model, paged = made(family, how, prefix_cache=True, **options)
    prompts = [zoo.prompt(40, seed=i) for i in range(3)]
    answers = [zoo.single(model, tokens, 2) for tokens in [*prompts, prompts[0]]]
    answers += zoo.batched(model, prompts, [2, 3, 2])
    return {"answers": answers, "reused": paged.prefixes.tokens_reused}


def refuse(family, how, **options):
    """Prompts too long for the pool of some rank, each followed by one that is not."""
    import mlx_lm_zoo as zoo
    from paged_mlx import OutOfPages

    model, paged = made(family, how, **options)
    short = zoo.prompt(20, seed=1)
    answers = [zoo.single(model, short, 4)]
    for ask in (zoo.single, lambda *given: zoo.batched(given[0], [given[1]], [given[2]])):
        try:
            ask(model, zoo.prompt(300, seed=2), 4)
        except (OutOfPages, ValueError) as error:
            answers.append(type(error).__name__)
        answers.append(zoo.single(model, short, 4))
    try:
        answers.append(zoo.single(model, zoo.prompt(60, seed=3), 200))  # it ends in the middle
    except OutOfPages:
        answers.append("ended")
    answers.append(zoo.batched(model, traffic(6), [5] * 6))
    paged.check()
    return {"answers": answers}


def answers(family, how, **options):
    """What ``refuse`` answers to the prompts that fit."""
    import mlx_lm_zoo as zoo

    model, _ = made(family, how, **options)
    return [zoo.single(model, zoo.prompt(20, seed=1), 4), zoo.batched(model, traffic(6), [5] * 6)]


SCENARIOS = {"serve": serve, "again": again, "refuse": refuse, "answers": answers}


if __name__ == "__main__":
    import mlx.core as mx
    from mlx_lm_zoo import GENERATE

    mx.distributed.init(strict=True)
    answer = SCENARIOS[sys.argv[1]](**json.loads(sys.argv[2]))
    mx.synchronize(GENERATE.generation_stream)
    mx.eval(mx.distributed.all_sum(mx.array(1)))  # nobody leaves while others wait for it
    print("ANSWER " + json.dumps(answer), flush=True)
