"""``paged-mlx serve``: completions, and what the server says of its pages, to a real client."""

import contextlib
import http.client
import http.server
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from argparse import Namespace

import pytest

pytest.importorskip("mlx_lm", reason="mlx-lm is not installed: pip install mlx-lm")

from mlx_lm_folder import write_model  # noqa: E402
from mlx_lm_http import OPTIONS, Client  # noqa: E402
from paged_mlx.cli import main as commands  # noqa: E402
from paged_mlx.mlx_lm import PromptStore, enable  # noqa: E402

if PromptStore is None:
    pytest.skip("this mlx-lm keeps its prompt store elsewhere", allow_module_level=True)

from paged_mlx.mlx_lm.serving.http import PortInUse, Server  # noqa: E402

CHATS = [[{"role": "user", "content": f"{text} Why is the sky blue?"}] for text in ("Hi.", "Oh.")]
SAMPLE = re.compile(r'^paged_mlx_\w+(\{(\w+="[^"]*",?)*\})? -?[\d.e+]+$')


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models") / "tiny", seed=5, num_hidden_layers=2)


@contextlib.contextmanager
def serving(folder, **options):
    """A server in this process; yields it, a client and a function that GETs."""
    cli_args = Namespace(**OPTIONS | {"model": str(folder), "prompt_cache_size": 10})

    def paged(model):
        return enable(model, page_size=8, **{"prefix_cache": True} | options)

    with Server("127.0.0.1", 0, cli_args, paged, lambda draft: enable(draft)) as server:
        port = int(server.url.rpartition(":")[2])
        thread = threading.Thread(target=server.run)
        thread.start()

        def get(path):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read().decode()

        try:
            for _ in range(600):
                if server.provider.paged is not None or server.provider.failure:
                    break
                time.sleep(0.05)
            yield server, Client(port), get
        finally:
            server.end()
            thread.join()


def metrics(text: str) -> dict[str, float]:
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    assert all(SAMPLE.match(line) for line in lines), lines
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


def test_answers_are_those_of_one_client_for_many_at_once_and_figures_say_what_served(folder):
    with serving(folder) as (server, client, get):
        expected = [client.chat(chat) for chat in CHATS]
        assert client.chats(CHATS * 3) == expected * 3
        status, text = get("/metrics")
        assert status == 200
        found = metrics(text)
        assert found["paged_mlx_model_loaded"] == 1
        calls = found['paged_mlx_attention_calls_total{route="pages",reason=""}']
        assert calls == server.provider.paged.paged_calls > 0
        assert not any('route="gather"' in name for name in found)
        assert found["paged_mlx_prompt_tokens_reused_total"] > 0
        ok = 'paged_mlx_http_requests_total{path="/v1/chat/completions",status="200"}'
        assert found[ok] == 8
        types = re.findall(r"^# TYPE (\S+) (gauge|counter)$", text, re.M)
        assert len(types) == len(dict(types)), "a metric has its type once"
        assert all(name.endswith("_total") for name, kind in types if kind == "counter")


def test_pages_say_who_holds_each_and_add_up(folder):
    with serving(folder) as (server, client, get):
        for chat in CHATS:
            client.chat(chat)
        found = json.loads(get("/pages")[1])
        (group,) = found["groups"]
        assert group["page_size"] == 8 and group["layers"] == 2
        assert len(group["pages"]) == group["total"] - group["free"]
        assert sum(cached for _, cached in group["pages"].values()) == group["cached"] > 0
        for page, (holders, cached) in group["pages"].items():
            holding = [s for s in group["sequences"] if int(page) in s["pages"]]
            assert holders == len(holding) + cached
        for sequence in group["sequences"]:
            assert len(sequence["pages"]) == -(-sequence["tokens"] // 8)
        assert found["nbytes"] == group["total"] * group["page_bytes"]


def test_an_estimate_says_whether_prompts_will_fit(folder):
    with serving(folder, num_pages=20) as (server, client, get):
        fits = json.loads(get("/estimate?tokens=80&max_new_tokens=8")[1])
        paged = server.provider.paged
        nbytes = paged.estimate([80], 8).nbytes
        assert nbytes >= 11 * paged.groups[None].page_bytes
        assert fits == {"tokens": [80], "max_new_tokens": 8, "fits": True, "bytes": nbytes}
        assert not json.loads(get("/estimate?tokens=80,60,40&max_new_tokens=8")[1])["fits"]
        for query in ("", "?tokens=80", "?tokens=x&max_new_tokens=1", "?tokens=0&max_new_tokens=1"):
            status, text = get(f"/estimate{query}")
            assert status == 400 and "must be whole numbers from" in json.loads(text)["error"]


def test_a_prompt_that_can_never_fit_is_refused_with_a_reason_and_others_go_on(folder):
    with serving(folder, num_pages=6) as (_, client, get):
        with pytest.raises(RuntimeError, match="must have .*pages|pages"):
            client.chat([{"role": "user", "content": "long " * 40}])
        assert client.chat([{"role": "user", "content": "Hi"}])
        assert get("/health")[0] == 200


def test_events_are_published_as_a_subscriber_of_vllms_reads_them(folder):
    zmq = pytest.importorskip("zmq", reason="pyzmq is not installed: pip install pyzmq")
    msgspec = pytest.importorskip("msgspec", reason="msgspec is not installed")
    from paged_mlx.mlx_lm.serving.kv_events import TOPIC, KVEventPublisher

    with serving(folder) as (server, client, _):
        (cache,) = server.provider.paged.prefixes.caches.values()
        cache.record_events(1000)
        publisher = KVEventPublisher("tcp://127.0.0.1:*", lambda: server.provider.paged)
        with zmq.Context() as context, context.socket(zmq.SUB) as socket:
            socket.connect(publisher.endpoint)
            socket.subscribe(TOPIC)
            time.sleep(0.3)  # a subscriber is heard of a moment later
            publisher.start()
            client.chat(CHATS[0])
            hashes, tokens = set(), []
            while socket.poll(5000 if not hashes else 500):
                topic, number, payload = socket.recv_multipart()
                assert topic == TOPIC.encode() and len(number) == 8
                _, events = msgspec.msgpack.decode(payload)
                for event in events:
                    if event["type"] == "BlockStored":
                        hashes.update(event["block_hashes"])
                        tokens += event["token_ids"]
            publisher.stop()
        # Whole pages of the prompt, and of the answer.
        assert len(hashes) == len(tokens) // 8 >= 3
        prompt = server.provider.tokenizer.apply_chat_template(CHATS[0], add_generation_prompt=True)
        assert tokens[:16] == prompt[:16]


def test_another_model_that_is_not_there_is_an_error_and_the_first_is_served_again(
    folder, tmp_path
):
    (tmp_path / "empty").mkdir()
    with serving(folder) as (server, client, get):
        expected = client.chat(CHATS[0])
        for model in (str(tmp_path / "empty"), str(tmp_path / "empty")):
            with pytest.raises(RuntimeError, match="config.json"):
                client.chat(CHATS[0], model=model)
        assert get("/pages")[0] == 503
        assert client.chat(CHATS[0]) == client.chat(CHATS[0]) == expected
        assert get("/pages")[0] == 200
        server.provider.paged.check()


def test_other_paths_are_mlx_lms_and_unknown_ones_are_404(folder):
    with serving(folder) as (_, _, get):
        assert get("/health") == (200, '{"status": "ok"}')
        assert get("/nowhere")[0] == 404 and get("/pages/1")[0] == 404


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_model_that_cannot_be_loaded_ends_the_server(tmp_path):
    with serving(tmp_path) as (server, _, _):  # an empty folder
        assert "config.json" in str(server.provider.failure)


def test_a_server_without_a_model_waits_for_one(folder):
    cli_args = Namespace(**OPTIONS | {"model": None, "prompt_cache_size": 10})
    with Server("127.0.0.1", 0, cli_args, enable, enable) as server:
        thread = threading.Thread(target=server.run)
        thread.start()
        connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=60)
        connection.request("GET", "/pages")
        answer = connection.getresponse()
        assert answer.status == 503 and "no model is loaded" in answer.read().decode()
        connection.request("GET", "/metrics")
        assert metrics(connection.getresponse().read().decode())["paged_mlx_model_loaded"] == 0
        server.end()
        thread.join()


def test_a_port_in_use_is_said_before_anything_is_loaded(folder, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(PortInUse, match=f"port {port} of 127.0.0.1 is in use"):
            Server("127.0.0.1", port, Namespace(**OPTIONS, prompt_cache_size=1), enable, enable)
        try:
            status = commands.main(["serve", "--model", str(folder), "--port", str(port)])
        except SystemExit as end:
            status = end.code
        assert status == 2
        assert "choose another with --port" in capsys.readouterr().err
    assert commands.main(["serve", "--model", str(folder), "--port", str(65536 + port)]) == 2
    assert f"--port must be at most 65535; got {65536 + port}" in capsys.readouterr().err


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return found.getsockname()[1]


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_command_serves_and_ends_cleanly_with_requests_under_way(folder, tmp_path, number):
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "paged_mlx", "serve", "--model", folder, "--port", str(port)],
        cwd=tmp_path, text=True, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    lines = []
    for line in process.stderr:
        lines.append(line)
        if "layers read pages" in line:
            break
    client = Client(port)
    assert client.chat(CHATS[0], max_tokens=8)

    def ask():
        with contextlib.suppress(Exception):
            client.chat(CHATS[1], max_tokens=100_000)

    asking = threading.Thread(target=ask)
    asking.start()
    time.sleep(1)
    process.send_signal(number)
    _, err = process.communicate(timeout=120)
    asking.join()
    assert process.returncode == 0, err
    assert "stopping" in err and "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.long
def test_a_model_that_cannot_be_loaded_ends_the_command_with_a_sentence(tmp_path):
    command = [sys.executable, "-m", "paged_mlx", "serve", "--port", str(free_port()), "--model"]
    done = subprocess.run([*command, tmp_path], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"paged-mlx serve: the model {tmp_path} cannot")


def test_the_map_of_a_running_server_is_drawn_saved_and_sent(folder, capsys, tmp_path):
    with serving(folder) as (server, client, get):
        client.chats(CHATS)
        status, page = get("/map")
        assert status == 200 and page.startswith("<!doctype html>")
        assert not re.search(r"""(src|href)=|https?://""", page)  # it needs no other file
        assert commands.main(["map", server.url]) == 0
        *rows, summary, legend = capsys.readouterr().out.splitlines()
        assert "2 layers" in rows[0] and re.match(r"[A-Z0-9c.]+$", rows[1])
        assert re.search(r"cached alone\), \d+ free", summary) and "digits: shared" in legend
        assert commands.main(["map", server.url, "--json"]) == 0
        (group,) = json.loads(capsys.readouterr().out)["groups"]
        assert group["cached"] > 0 and group["page_size"] == 8
        pytest.importorskip("matplotlib")
        picture = tmp_path / "pages.svg"
        assert commands.main(["map", server.url, "--save", str(picture)]) == 0
        assert "cached alone" in picture.read_text()


def test_a_server_that_ends_while_it_is_watched_is_a_sentence_below_its_last_map(
    monkeypatch, capsys
):
    from paged_mlx.cli import map as map_command

    figures = {"page_size": 4, "total": 3, "sequences": [], "pages": {"1": [1, True]}}
    answers = [{"groups": [figures | {"window": None, "layers": 2}]}]

    def pages_of(url):
        if not answers:
            raise map_command.Mistake("nobody serves pages")
        return answers.pop()

    monkeypatch.setattr(map_command, "pages_of", pages_of)
    monkeypatch.setattr(map_command, "EVERY", 0)
    assert commands.main(["map", "--watch"]) == 2
    out, err = capsys.readouterr()
    assert out.startswith("2 layers\n.c.\n") and err == "paged-mlx map: nobody serves pages\n"


@pytest.mark.parametrize(
    "status, body, says",
    [(200, b"{}", "is no server of paged-mlx"), (503, b'{"error": "no model"}', "503: no model")],
)
def test_the_map_of_something_else_is_a_sentence(status, body, says, capsys):
    class Other(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Other) as other:
        thread = threading.Thread(target=other.handle_request)
        thread.start()
        assert commands.main(["map", f"http://127.0.0.1:{other.server_port}"]) == 2
        thread.join()
    assert commands.main(["map", f"http://127.0.0.1:{other.server_port}"]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert says in first and "nobody serves pages" in second


@pytest.mark.long
@pytest.mark.skipif(not shutil.which("chromium"), reason="no chromium")
def test_a_browser_draws_the_live_map(folder):
    with serving(folder) as (server, client, get):
        client.chats(CHATS)
        words = ["--headless", "--no-sandbox", "--dump-dom", "--virtual-time-budget=3000"]
        done = subprocess.run(
            ["chromium", *words, f"{server.url}/map"], capture_output=True, text=True, timeout=120
        )
        total = json.loads(get("/pages")[1])["groups"][0]["total"]
        assert done.stdout.count('<div class="page') == total, done.stderr
        assert "pages of 8 tokens in use" in done.stdout
        assert "MiB reserved</span>" in done.stdout
