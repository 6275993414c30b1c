"""mlx_lm.server with a model that is in memory already, and a client of it."""

import argparse
import contextlib
import http.client
import json
import logging
import threading
from http.server import ThreadingHTTPServer

import mlx.core as mx
from mlx_lm import server
from mlx_lm.models.cache import LRUPromptCache, make_prompt_cache

OPTIONS = {
    "adapter_path": None,
    "allowed_origins": ["*"],
    "chat_template": "",
    "chat_template_args": {},
    "decode_concurrency": 8,
    "draft_model": None,
    "kv_bits": None,
    "kv_group_size": 64,
    "max_tokens": 12,
    "min_p": 0.0,
    "model": "in memory",
    "num_draft_tokens": 3,
    "pipeline": False,
    "prefill_step_size": 16,
    "prompt_cache_bytes": None,
    "prompt_concurrency": 4,
    "quantized_kv_start": 0,
    "temp": 0.0,
    "top_k": 0,
    "top_p": 1.0,
    "trust_remote_code": False,
    "use_default_chat_template": False,
}


class Provider(server.ModelProvider):
    """Has its models from the start."""

    def __init__(self, model, tokenizer, draft, options):
        super().__init__(argparse.Namespace(**{**OPTIONS, **options}))
        self._given = model, tokenizer, draft

    def _load(self, *key):
        self.model, self.tokenizer, self.draft_model = self._given
        self.model_key = key
        caches = make_prompt_cache(self.model)
        self.is_batchable = self.draft_model is None and all(hasattr(c, "merge") for c in caches)

    def reset(self):
        # The generating thread ends here, and MLX aborts if work of an ended thread is under way.
        mx.synchronize()
        super().reset()


class Client:
    """Asks the server on a port of this machine."""

    def __init__(self, port: int):
        self._port = port

    def chat(self, messages: list[dict], stream: bool = False, **options) -> str:
        """The answer's text."""
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=900)
        body = json.dumps({"messages": messages, "stream": stream, **options})
        connection.request("POST", "/v1/chat/completions", body)
        response = connection.getresponse()
        text = response.read().decode()
        connection.close()
        if response.status != 200:
            raise RuntimeError(text)
        if not stream:
            return json.loads(text)["choices"][0]["message"].get("content", "")
        events = [line[6:] for line in text.splitlines() if line.startswith("data: {")]
        choices = [json.loads(event)["choices"] for event in events]
        return "".join(choice[0]["delta"].get("content") or "" for choice in choices if choice)

    def chats(self, conversations: list[list[dict]]) -> list[str]:
        """The answers to several at once, every second one streamed."""
        answers = [None] * len(conversations)

        def ask(i):
            answers[i] = self.chat(conversations[i], stream=i % 2 == 0)

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(answers))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return answers


@contextlib.contextmanager
def serving(model, tokenizer, draft=None, prompt_cache_size=10, **options):
    """A running server; yields a client."""
    provider = Provider(model, tokenizer, draft, options)
    generator = server.ResponseGenerator(provider, LRUPromptCache(prompt_cache_size))

    class Handler(server.APIHandler):
        def __init__(self, *args):
            super().__init__(generator, *args, system_fingerprint="test")

        def log_message(self, *args):
            logging.debug(*args)

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    listener = threading.Thread(target=httpd.serve_forever)
    listener.start()
    try:
        yield Client(httpd.server_port)
    finally:
        httpd.shutdown()
        generator.stop_and_join()
        listener.join()
        httpd.server_close()
