"""Several ranks of ``mx.distributed`` over loopback: starting them, and what each of them does.

``run`` starts the file itself once for each rank, as ``mlx.launch`` would, and returns what each has
answered. ``alone`` does the same in this process, with the whole model.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
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
        commands: Python's arguments, for each rank.
    """

    def __init__(self, *commands: list[str]):
        self._folder = tempfile.TemporaryDirectory()
        hostfile = os.path.join(self._folder.name, "hosts.json")
        with open(hostfile, "w") as file:
            json.dump([[f"127.0.0.1:{port}"] for port in free_ports(len(commands))], file)
        self._logs, self.processes = [], []
        for rank, command in enumerate(commands):
            told = {"MLX_RANK": str(rank), "MLX_HOSTFILE": hostfile, "OPENBLAS_NUM_THREADS": "1"}
            log = open(os.path.join(self._folder.name, f"log {rank}"), "w+")
            self._logs.append(log)
            self.processes.append(
                subprocess.Popen(
                    [sys.executable, *command],
                    env={**os.environ, **told},
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

    def wait(self, limit: float = LIMIT, of: int | None = None) -> list[int | None]:
        """Exit codes of the first ranks, or of all; None of one that has not come to its end."""
        end = time.monotonic() + limit
        for process in self.processes[:of]:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.01, end - time.monotonic()))
        return [process.poll() for process in self.processes[:of]]

    def answer(self, rank: int):
        lines = [line for line in self.output(rank).splitlines() if line.startswith("ANSWER ")]
        return json.loads(lines[-1].removeprefix("ANSWER "))

    def output(self, rank: int) -> str:
        with open(self._logs[rank].name) as file:
            return file.read()

    def outputs(self) -> str:
        return "\n".join(f"--- rank {i}\n{self.output(i)}" for i in range(len(self.processes)))


def commands(scenario: str, *options: dict) -> list[list[str]]:
    """A scenario with the options of each rank."""
    return [[HERE, scenario, json.dumps(each)] for each in options]


def run(scenario: str, *options: dict, limit: float = LIMIT) -> list:
    """What each rank answers to a scenario, with ``options`` of its own."""
    with Ranks(*commands(scenario, *options)) as ranks:
        codes = ranks.wait(limit)
        if any(codes) or None in codes:
            raise AssertionError(f"exit codes {codes}\n{ranks.outputs()}")
        return [ranks.answer(i) for i in range(len(options))]


def alone(scenario: str, **options):
    """What one process answers, which has room for all pages."""
    from paged_mlx.mlx_lm.model_seam import enabled_models

    try:
        return SCENARIOS[scenario](**{**options, "how": None, "room": None})
    finally:
        for paged in enabled_models():
            paged.disable()


# What a rank does


def made(family: str, how: str | None, late=False, config=None, room=None, page_size=8, **enabled):
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
    paged = enable(model, page_size=page_size, **enabled) if late else None
    if how == "tp":
        model.shard(mx.distributed.init())
    elif how == "pp":
        getattr(model, "language_model", model).model.pipeline(mx.distributed.init())
    mx.eval(model.parameters())
    return model, paged or enable(model, page_size=page_size, **enabled)


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


def speculate(family, how, **options):
    """A ragged batch with drafts by look-up, and again with those of a model that is not shared."""
    import mlx_lm_zoo as zoo
    from paged_mlx.mlx_lm import SpeculativeBatchGenerator

    model, paged = made(family, how, **options)
    prompts, tokens = [prompt * 2 for prompt in traffic(5)], {}
    for draft in (None, zoo.tiny("llama", seed=7)):
        with SpeculativeBatchGenerator(model, draft, completion_batch_size=3) as generator:
            generator.insert(prompts, [5, 9, 3, 12, 7])
            while responses := generator.next():
                for each in responses:
                    tokens.setdefault(f"{draft is None} {each.uid}", []).extend(each.tokens)
    paged.check()
    reused = paged.prefixes.tokens_reused if paged.prefixes is not None else 0
    return {"answers": tokens, "reused": reused}


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
    return {"answers": answers, "limits": [paged.num_pages, paged.max_bytes]}


def file(family, how, **options):
    """What the server's prompt store gives back: a prompt that all ranks have filed, and one that
    the last rank has not; then a batch for which the store gives up its pages."""
    import mlx_lm_zoo as zoo
    from mlx_lm.models.cache import LRUPromptCache

    model, paged = made(family, how, **options)
    rank, size = paged.ranks.place
    store, prompts = LRUPromptCache(10), traffic(2)
    for i, tokens in enumerate(prompts):
        cache = model.make_cache()
        zoo.single(model, tokens, 1, cache=cache)
        if i == 0 or rank < size - 1:
            store.insert_cache("model", tokens, cache)
    found = [store.fetch_nearest_cache("model", tokens + [5, 6]) for tokens in prompts]
    filed = [(cache is not None, len(rest)) for cache, rest in found]
    del cache, found
    longest_first = sorted(traffic(6, seed=7), key=len, reverse=True)
    return {"filed": filed, "answers": zoo.batched(model, longest_first, [4] * 6)}


def lose(family, how, lost: int, **options):
    """Rank ``lost`` dies in the middle of an answer, which a thread gives, as in the server."""
    import mlx.core as mx
    import mlx_lm_zoo as zoo
    from paged_mlx.mlx_lm import lost_ranks

    lost_ranks.GRACE, lost_ranks.LOOK = 2.0, 0.2
    model, paged = made(family, how, **options)

    def answer():
        tokens = mx.array(zoo.prompt(40, seed=1))
        for i, _ in enumerate(zoo.GENERATE.generate_step(tokens, model, max_tokens=10_000)):
            if i == 20 and paged.ranks.rank == lost:
                os.kill(os.getpid(), signal.SIGKILL)

    thread = threading.Thread(target=answer)
    thread.start()
    thread.join()
    sys.exit("the thread has ended")


def chat(family, how, options=None, **enabled):
    """Rank 0 asks ``mlx_lm.server`` and answers with the texts; the others compute, until it ends."""
    import mlx_lm_prompts
    from mlx_lm import server
    from mlx_lm.models.cache import LRUPromptCache
    from mlx_lm_http import Provider, serving

    model, paged = made(family, how, **enabled)
    tokenizer = mlx_lm_prompts.tokenizer()
    if paged.ranks.rank > 0:
        given = model, tokenizer, None, {"pipeline": how == "pp", **(options or {})}
        server.ResponseGenerator(Provider(*given), LRUPromptCache(1)).join()
        os._exit(0)
    system = {"role": "system", "content": "You are a kind machine, and answer in few words."}
    asked = ["Hello?", "How are you", "Why is the sky blue?", "Where?"]
    chats = [[system, {"role": "user", "content": each}] for each in asked]
    with serving(
        model, tokenizer, prompt_cache_size=1, pipeline=how == "pp", **(options or {})
    ) as client:
        texts = [client.chat(chats[0]), *client.chats(chats)]
        for _ in range(2):
            for each, text in zip(chats, texts[1:]):
                each += [{"role": "assistant", "content": text}, {"role": "user", "content": "Why"}]
            texts += client.chats(chats)
        try:
            client.chat([{"role": "user", "content": "Why? " * 60}])
        except RuntimeError as error:
            texts.append(str(error))
        texts.append(client.chat(chats[0]))
        reused = paged.prefixes.tokens_reused if paged.prefixes is not None else 0
        answer = {"answers": texts, "reused": reused}
        if how is not None:  # rank 1 goes on asking rank 0
            print("ANSWER " + json.dumps(answer), flush=True)
            os._exit(0)
    return answer


def keep(family, how, folder, **options):
    """Prompts begun and remembered by hand, and files: this rank's, the other's, one machine's."""
    import mlx.core as mx
    import mlx_lm_zoo as zoo

    model, paged = made(family, how, **options)
    rank, size = paged.ranks.place
    prompts, answers, known = traffic(4), [], []
    for turn in range(6):
        tokens = prompts[turn % 4] + (answers[turn % 4] + [5, 6, 7] if turn > 3 else [])
        cache, rest = paged.begin(tokens, key="tenant")
        known.append(len(tokens) - len(rest))
        answers.append(zoo.single(model, rest, 3, cache=cache))
        paged.remember(tokens + answers[-1], cache)
    path = f"{folder}/{rank} of {size}.safetensors"
    paged.save(path, cache)
    loaded = paged.load(path)
    answers.append(zoo.single(model, [1, 2, 3], 3, cache=loaded))
    mx.eval(mx.distributed.all_sum(mx.array(1)))  # all files are there
    errors = []
    for other in (f"{(rank + 1) % size} of {size}", "0 of 1"):
        try:
            paged.load(f"{folder}/{other}.safetensors") if size > 1 else None
        except ValueError as error:
            errors.append(str(error))
    return {"answers": answers, "reused": sum(known), "errors": errors}


def meet(how, tokens=None, **options):
    """A prompt on a model, or why it is refused."""
    import mlx_lm_zoo as zoo

    try:
        model, paged = made("llama", how, **options)
        return zoo.single(model, zoo.prompt(30, seed=tokens or 1), 4)
    except ValueError as error:
        return str(error)


def answers(family, how, **options):
    """What ``refuse`` answers to the prompts that fit."""
    import mlx_lm_zoo as zoo

    model, _ = made(family, how, **options)
    return [zoo.single(model, zoo.prompt(20, seed=1), 4), zoo.batched(model, traffic(6), [5] * 6)]


_ALL = (serve, speculate, again, refuse, keep, file, meet, lose, chat, answers)
SCENARIOS = {scenario.__name__: scenario for scenario in _ALL}


if __name__ == "__main__":
    import mlx.core as mx
    from mlx_lm_zoo import GENERATE

    mx.distributed.init(strict=True)
    answer = SCENARIOS[sys.argv[1]](**json.loads(sys.argv[2]))
    mx.synchronize(GENERATE.generation_stream)
    mx.eval(mx.distributed.all_sum(mx.array(1)))  # nobody leaves while others wait for it
    print("ANSWER " + json.dumps(answer), flush=True)
