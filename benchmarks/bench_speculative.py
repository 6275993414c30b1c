"""What do drafts gain a batch, each row of which keeps its own number of them?

SmolLM2-135M-Instruct answers prompts together, on pages: a token of each row in a step, or with drafts
by prompt look-up. Answers that repeat their prompt have something to look up, others hardly. The
answers are compared first. Times are of whole answers, prompts read. No smaller model of this vocabulary
is at hand: drafts of a model are not measured.
"""

import paged_mlx
from mlx_lm import batch_generate
from paged_mlx.mlx_lm import speculative_batch_generate
from paged_mlx.mlx_lm.demo import smollm2

from benchmarks.harness import Candidate, Case, environment, format_case, measure, save

MAX_TOKENS, ROUNDS = 32, 2
NUM_DRAFTS = (3, 8)
TEXTS = (
    "Boil two large potatoes in salted water for twenty minutes. Drain them, and let them cool. Fry "
    "one chopped onion in a spoon of oil until it is golden. Mash the potatoes with the onion, a "
    "pinch of salt and a spoon of butter.",
    "The museum opens at nine and closes at five. Tickets cost four coins for adults and two coins "
    "for children. The cafe on the second floor serves soup, bread and tea until four. Please leave "
    "coats and large bags in the lockers at the entrance.",
)
REPEATED = [
    f"{ask}\n\n{text}"
    for ask in (
        "Repeat this text word for word, and add nothing:",
        "Copy this text exactly as it is:",
    )
    for text in TEXTS
]
QUESTIONS = [
    "Why is the sky blue?",
    "How do birds fly?",
    "Write a short story about a fox.",
    "What do bees eat?",
]
PROMPTS = {
    "1 prompt, its text repeated": REPEATED[:1],
    "4 prompts, their texts repeated": REPEATED,
    "4 questions": QUESTIONS,
}


def cases(name: str, texts: list[str], model, tokenizer) -> list[dict]:
    """Times of whole answers, and tokens that a row gets in a step."""
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True
        )
        for text in texts
    ]
    tokens_a_step = {"no drafts": 1.0}

    def plain():
        return batch_generate(model, tokenizer, prompts, max_tokens=MAX_TOKENS).texts

    def drafted(kind: str, num_draft_tokens: int) -> Candidate:
        def run():
            found = speculative_batch_generate(
                model, tokenizer, prompts, None, num_draft_tokens, max_tokens=MAX_TOKENS
            )
            steps = sum(map(len, found.accepted_lengths))
            tokens_a_step[kind] = round(found.stats.generation_tokens / steps, 2)
            return found.texts

        return Candidate(kind, run)

    def same(texts):
        assert len(set(map(tuple, texts.values()))) == 1, "the answers differ"

    drafts = [drafted(f"look-up, up to {n} drafts", n) for n in NUM_DRAFTS]
    timed = measure(Case(name, [Candidate("no drafts", plain), *drafts], same, ROUNDS, warmups=1))
    medians = [
        {"name": kind, "median": value, "limit": False} for kind, value in tokens_a_step.items()
    ]
    return [timed, {"name": name, "about": {"figure": "token a step"}, "candidates": medians}]


def main():
    record = {"question": "speculative", **environment(), "cases": []}
    model, tokenizer = smollm2.load(print)
    with paged_mlx.enable(model):
        for name, texts in PROMPTS.items():
            timed, steps = cases(name, texts, model, tokenizer)
            record["cases"] += [timed, steps]
            print(format_case(timed), *steps["candidates"], sep="\n", flush=True)
    record["cases"].sort(key=lambda case: "figure" in case["about"])
    save(record)


if __name__ == "__main__":
    main()
