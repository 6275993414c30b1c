"""Several machines: ranks of ``mx.distributed`` over loopback, each a process of its own."""

import signal

import pytest

pytest.importorskip("mlx_lm", reason="mlx-lm is not installed: pip install mlx-lm")

import mlx_lm  # noqa: E402
import mlx_lm_ranks as ranks  # noqa: E402
import mlx_lm_zoo as zoo  # noqa: E402
from mlx_lm_folder import write_model  # noqa: E402
from mlx_lm_http import Client  # noqa: E402

# Attention in the second half of the layers alone: the rank that has the first has none.
HALF = {"num_hidden_layers": 4, "full_attention_interval": 4}
# Each rank ends with attention: what it sends hangs on no recurrent state.
EVEN = {"num_hidden_layers": 4, "full_attention_interval": 2}


def served(
    family: str, how: str, *of_ranks: dict, scenario="serve", **options
) -> tuple[dict, list[dict]]:
    """What one process answers with the first rank's options, and what the ranks answer."""
    expected = ranks.alone(scenario, family=family, **{**options, **of_ranks[0], "late": False})
    told = [dict(family=family, how=how, **{**options, **each}) for each in of_ranks]
    found = ranks.run(scenario, *told)
    for rank, answer in enumerate(found):
        assert answer["answers"] == expected["answers"], f"rank {rank}"
        assert answer["reused"] == found[0]["reused"], f"rank {rank}"
    return expected, found


def test_a_machine_with_less_memory_forgets_for_all_of_them():
    expected, found = served("llama", "tp", {}, {"room": 16}, scenario="again")
    assert 0 < found[0]["reused"] < expected["reused"]


@pytest.mark.long
@pytest.mark.parametrize(("prefix_cache", "late"), [(True, False), (True, True), (False, True)])
@pytest.mark.parametrize(
    ("family", "how", "config"),
    [
        ("llama", "tp", {}),
        ("gpt_oss", "tp", {}),
        ("deepseek_v3", "tp", {}),
        ("qwen3_5", "tp", {"vocab_size": 98}),
        ("qwen2", "pp", {}),
        ("ministral3", "pp", {}),
        ("qwen3_5", "pp", EVEN),
        ("qwen3_5", "pp", HALF),
    ],
)
def test_ranks_answer_as_one_machine(family, how, config, prefix_cache, late):
    options = {"config": config, "prefix_cache": prefix_cache, "late": late}
    _, found = served(family, how, options, options)
    assert (found[0]["reused"] > 0) == prefix_cache


@pytest.mark.long
@pytest.mark.parametrize(("family", "how"), [("llama", "tp"), ("gpt_oss", "tp"), ("qwen2", "pp")])
def test_rows_of_a_speculative_batch_roll_back_alike_on_all_ranks(family, how):
    served(family, how, {}, {}, scenario="speculate")
    served(
        family, how, {"num_pages": 64}, {"num_pages": 40}, scenario="speculate", prefix_cache=True
    )


@pytest.mark.long
def test_prompts_of_a_speculative_batch_wait_for_the_rank_with_more_layers():
    # Rows need up to 19 pages, of 1 KB a layer: one rank has room for 45, the other for 90.
    options = {"config": {"num_hidden_layers": 3}, "max_bytes": 90 * 1024}
    served("qwen2", "pp", options, options, scenario="speculate")


@pytest.mark.long
def test_three_ranks_of_which_one_alone_has_attention_and_no_states():
    expected, found = served("qwen3_5", "pp", {}, {}, {}, prefix_cache=True)
    assert 0 < found[0]["reused"] <= expected["reused"]


@pytest.mark.long
@pytest.mark.parametrize(
    ("family", "how", "config"),
    [
        ("qwen3", "tp", {}),
        ("ministral3", "tp", {}),
        ("ministral3", "pp", {}),
        ("qwen3_5", "pp", {}),
        ("qwen3_5", "pp", HALF),
    ],
)
@pytest.mark.parametrize(
    "less", [{"room": 12}, {"room": 40}, {"num_pages": 24}, {"max_bytes": 40000}]
)
def test_ranks_with_less_memory_answer_as_one_machine(family, how, config, less):
    options = {"config": config, "prefix_cache": True, "requests": 8}
    more = {name: 3 * value for name, value in less.items()}
    of_ranks = [less, more] if how == "tp" else [more, less]
    _, found = served(family, how, *of_ranks, **options)
    assert found[0]["reused"] > 0


@pytest.mark.long
@pytest.mark.parametrize("prefix_cache", [False, True])
@pytest.mark.parametrize(
    ("family", "how", "limits"),
    [
        ("llama", "tp", [{"num_pages": 40}, {"num_pages": 20}]),
        ("ministral3", "pp", [{"num_pages": 20}, {"num_pages": 30}]),
        ("qwen3", "tp", [{"max_bytes": 24000}, {"max_bytes": 40000}]),
        ("qwen3_5", "pp", [{"num_pages": 20, "config": HALF}, {"num_pages": 30, "config": HALF}]),
    ],
)
def test_what_has_no_pages_on_one_rank_is_refused_on_all(family, how, limits, prefix_cache):
    told = [dict(family=family, how=how, prefix_cache=prefix_cache, **each) for each in limits]
    first, second = ranks.run("refuse", *told)
    assert first == second
    short, refused, again, never, once_more, middle, batch = first["answers"]
    assert (refused, never, middle) == ("OutOfPages", "ValueError", "ended")
    assert short == again == once_more
    unlimited = ranks.alone("answers", family=family, config=limits[0].get("config"))
    assert [short, batch] == unlimited


@pytest.mark.long
@pytest.mark.parametrize(("family", "how", "room"), [("llama", "tp", 24), ("qwen3_5", "pp", 34)])
def test_prompts_kept_by_hand_and_in_files_are_of_a_rank(tmp_path, family, how, room):
    options = {"scenario": "keep", "folder": str(tmp_path)}
    expected, found = served(family, how, {}, {"room": room}, **options)
    assert 0 < found[0]["reused"] <= expected["reused"]
    for rank, answer in enumerate(found):
        of_the_other, of_one = answer["errors"]
        must = rf"[load] path must be a file of this rank, {rank} of 2; got "
        assert of_the_other.startswith(must) and f"of {1 - rank} of 2" in of_the_other
        assert of_one.startswith(must) and "of 0 of 1" in of_one


@pytest.mark.long
def test_what_is_not_filed_on_all_ranks_is_not_given_back():
    told = {"family": "llama", "how": "tp", "num_pages": 14}
    expected = ranks.alone("file", **told)["answers"]
    length = len(ranks.traffic(2)[1])
    for found in ranks.run("file", told, told):
        assert found == {"filed": [[True, 2], [False, length + 2]], "answers": expected}


@pytest.mark.long
@pytest.mark.parametrize(
    ("one", "other", "says"),
    [
        ({"page_size": 8}, {"page_size": 16}, "page_size, retain"),
        ({"prefix_cache": True}, {}, "page_size, retain"),
        ({"num_pages": 20}, {}, "page_size, retain"),
        ({"max_bytes": 100_000}, {"max_bytes": 100}, "max_bytes must be at least"),
        ({"prefix_cache": True}, {"prefix_cache": True, "tokens": 2}, "the same prompts"),
    ],
)
def test_ranks_that_are_told_different_things_are_told_so(one, other, says):
    for message in ranks.run("meet", {"how": "tp", **one}, {"how": "tp", **other}):
        assert says in message


@pytest.mark.long
def test_ranks_with_models_and_prompts_of_their_own_ask_nobody():
    told = [{"how": None, "prefix_cache": True, "tokens": tokens} for tokens in (1, 2)]
    expected = [ranks.alone("meet", **each) for each in told]
    assert ranks.run("meet", *told) == expected and expected[0] != expected[1]


@pytest.mark.long
@pytest.mark.parametrize(
    ("family", "how", "enabled"),
    [
        ("llama", "tp", {"num_pages": 40, "prefix_cache": True}),
        ("qwen2", "pp", {"prefix_cache": True}),
        ("qwen3_5", "pp", {"num_pages": 60, "prefix_cache": True}),
        ("gpt_oss", "tp", {"num_pages": 40}),
    ],
)
def test_the_server_of_several_ranks_answers_as_one_machines(family, how, enabled):
    expected = ranks.alone("chat", family=family, **enabled)
    told = {"family": family, "how": how, **enabled}
    with ranks.Ranks(*ranks.commands("chat", told, told)) as processes:
        assert processes.wait(of=1) == [0], processes.outputs()
        found = processes.answer(0)
    assert found["answers"] == expected["answers"]
    assert (found["reused"] > 0) == ("prefix_cache" in enabled)


@pytest.mark.long
@pytest.mark.parametrize("pipeline", [[], ["--pipeline"]])
def test_the_command_serves_a_model_on_several_ranks(tmp_path, pipeline):
    folder = str(write_model(tmp_path / "model", "qwen2", num_hidden_layers=4))
    [port] = ranks.free_ports(1)
    command = ["-m", "paged_mlx", "serve", "--model", folder, "--port", str(port)]
    command += ["--page-size", "8", "--num-pages", "60", "--temp", "0", *pipeline]
    model, tokenizer = mlx_lm.load(folder)
    said = [[{"role": "user", "content": f"{each}, you kind machine"}] for each in ("Hi", "Oh")]
    tokens = [tokenizer.apply_chat_template(each, add_generation_prompt=True) for each in said]
    expected = [tokenizer.decode(zoo.single(model, each, 8)) for each in tokens]
    with ranks.Ranks(command, command) as processes:
        while "serving on" not in processes.output(0):
            assert processes.wait(limit=0.1) == [None, None], processes.outputs()
        client = Client(port)
        for _ in range(2):
            assert [client.chat(each, max_tokens=8) for each in said] == expected
        assert client.chats(said * 3) == [client.chat(each) for each in said] * 3
        with pytest.raises(RuntimeError, match="fit|pages"):
            client.chat([{"role": "user", "content": "Why? " * 200}])
        assert client.chat(said[0], max_tokens=8) == expected[0]
        processes.processes[0].send_signal(signal.SIGINT)
        assert processes.wait(of=1, limit=60) == [0], processes.outputs()


@pytest.mark.long
@pytest.mark.parametrize("lost", [0, 1])
@pytest.mark.parametrize(
    ("family", "how", "enabled"),
    [("llama", "tp", {"num_pages": 2000}), ("qwen2", "pp", {"prefix_cache": True})],
)
def test_a_rank_that_dies_is_an_error_on_the_other(family, how, enabled, lost):
    told = {"family": family, "how": how, "lost": lost, **enabled}
    with ranks.Ranks(*ranks.commands("lose", told, told)) as processes:
        codes = processes.wait(limit=60)
        assert codes[lost] == -9 and codes[1 - lost] not in (0, None), processes.outputs()
        said = processes.output(1 - lost)
    by_watcher = f"rank {1 - lost} of 2 ends: another rank is gone"
    assert by_watcher in said or "connection to a peer was lost" in said
