"""What do drafts gain a batch, each row of which keeps its own number of them?

SmolLM2-135M-Instruct answers four prompts together, on pages: a token a row in each step, or with
drafts by prompt look-up, or of a copy of itself in 4 bits. Two kinds of prompts: answers that repeat
the prompt, and answers that do not. The tokens of all candidates are compared first.
"""

import copy

import mlx.core as mx
import mlx.nn as nn
import paged_mlx
from mlx_lm import batch_generate
from paged_mlx.mlx_lm import speculative_batch_generate

from benchmarks.harness import Candidate, Case, environment, format_case, measure, save

MAX_TOKENS, ROUNDS = 40, 4
RECIPE = """Boil two large potatoes in salted water for twenty minutes. Drain them, and let them cool. \
Fry one chopped onion in a spoon of oil until it is golden. Mash the potatoes with the onion, a pinch of \
salt and a spoon of butter. Serve it warm with green salad."""
NOTICE = """The museum opens at nine and closes at five. Tickets cost four coins for adults and two coins \
for children. The café on the second floor serves soup, bread and tea until four. Please leave coats and \
large bags in the lockers at the entrance."""
PROMPTS = {
    "answers that repeat the prompt": [
        f"Repeat this text word for word, and add nothing:\n\n{text}" for text in (RECIPE, NOTICE)
    ]
    + [f"Copy this text exactly as it is:\n\n{text}" for text in (RECIPE, NOTICE)],
    "answers that do not": [
        "Why is the sky blue?",
        "How do birds fly?",
        "Write a short story about a fox.",
        "What do bees eat?",
    ],
}


def load():
    from paged_mlx.demo import smollm2

    return smollm2.load(print)


def in_four_bits(model):
    draft = copy.deepcopy(model)
    nn.quantize(draft, group_size=64, bits=4)
    mx.eval(draft.parameters())
    return draft


def cases(name, texts, model, draft, tokenizer):
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True
        )
        for text in texts
    ]
    tokens_a_step = {}

    def plain():
        answers = batch_generate(model, tokenizer, prompts, max_tokens=MAX_TOKENS)
        tokens_a_step["no drafts"] = 1.0
        return answers.texts

    def drafted(kind, **options):
        def run():
            found = speculative_batch_generate(
                model, tokenizer, prompts, max_tokens=MAX_TOKENS, **options
            )
            steps = sum(map(len, found.accepted_lengths))
            tokens_a_step[kind] = round(found.stats.generation_tokens / steps, 2)
            return found.texts

        return Candidate(kind, run)

    candidates = [
        Candidate("no drafts", plain),
        drafted("prompt look-up", num_draft_tokens=6),
        drafted("drafts of a 4-bit copy", draft_model=draft, num_draft_tokens=3),
    ]

    def same(texts):
        assert len(set(map(tuple, texts.values()))) == 1, "the answers differ"

    timed = measure(Case(name, candidates, same, ROUNDS, warmups=1))
    medians = [
        {"name": kind, "median": value, "limit": False} for kind, value in tokens_a_step.items()
    ]
    about = {"figure": "tokens a row in each step"}
    return [timed, {"name": name, "about": about, "candidates": medians}]


def main():
    model, tokenizer = load()
    draft = in_four_bits(model)
    record = {"question": "speculative", **environment(), "cases": []}
    with paged_mlx.enable(model), paged_mlx.enable(draft):
        for name, texts in PROMPTS.items():
            timed, steps = cases(name, texts, model, draft, tokenizer)
            record["cases"] += [timed, steps]
            print(format_case(timed), *steps["candidates"], sep="\n", flush=True)
    record["cases"].sort(key=lambda case: "figure" in case["about"])
    save(record)


if __name__ == "__main__":
    main()
