"""A chat server's prefix reuse by hand: each turn computes its new tokens alone.

    python examples/prefix_reuse.py

A turn's prompt is the whole chat so far, as a server gets it. ``begin`` finds what is known of it,
``remember`` files what has been computed, under the tenant's key: nobody finds another's pages.
Needs mlx-lm; the model is a tiny llama with random weights.
"""

import mlx.core as mx
import paged_mlx
from mlx_lm.generate import generate_step
from mlx_lm.models import llama

SYSTEM = list(range(100, 148))
CHATS = {"anna": "tenant 1", "ben": "tenant 1", "carla": "tenant 2"}


def tiny_llama(seed=0):
    config = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2}
    config |= {"intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    config |= {"head_dim": 16, "vocab_size": 256, "rms_norm_eps": 1e-5}
    config |= {"tie_word_embeddings": False}
    mx.random.seed(seed)
    model = llama.Model(llama.ModelArgs.from_dict(config))
    mx.eval(model.parameters())
    return model


def answer(model, tokens, cache=None, max_tokens=6):
    steps = generate_step(mx.array(tokens), model, max_tokens=max_tokens, prompt_cache=cache)
    return [int(token) for token, _ in steps]


class Server:
    def __init__(self, model):
        self.model, self.paged = model, paged_mlx.enable(model, page_size=8)

    def complete(self, tokens, tenant):
        """The answer to a prompt, and how many of the prompt's tokens were not computed again."""
        cache, rest = self.paged.begin(tokens, key=tenant)
        answered = answer(self.model, rest, cache)
        self.paged.remember(tokens + answered, cache)  # under begin's key
        return answered, len(tokens) - len(rest)


def main():
    model = tiny_llama()
    server, asked = Server(model), []
    chats = {name: list(SYSTEM) for name in CHATS}
    for turn in range(3):
        for number, (name, tenant) in enumerate(CHATS.items()):
            chats[name] += [10 * number + turn, 200 + turn, 210 + number, 7]  # what the user says
            prompt = list(chats[name])
            answered, known = server.complete(prompt, tenant)
            chats[name] += answered
            asked.append((prompt, answered, known))
            print(f"turn {turn}, {name}: {len(prompt)} tokens, {known} known, says {answered}")

    known = [known for *_, known in asked]
    assert known[0] == 0 and known[2] == 0  # the first of each tenant computes everything
    assert known[1] == len(SYSTEM)  # Ben's prompt begins as Anna's
    for first, second in zip(asked, asked[len(CHATS) :]):  # a chat's next turn knows the one before
        assert second[2] >= len(first[0])
    server.paged.check()
    server.paged.disable()
    for prompt, answered, _ in asked:
        assert answered == answer(model, prompt)  # by mlx-lm's own caches
    total = sum(len(prompt) for prompt, *_ in asked)
    print(
        f"{sum(known)} of {total} tokens were known; the answers are those of mlx-lm's own caches"
    )


if __name__ == "__main__":
    main()
