"""An agent that branches and rolls back: forks are thoughts, truncate takes a tool call back.

    python examples/agent.py

The agent tries a few thoughts from one context, keeps the best, and calls a tool after it. A tool
that fails is taken back, as if it had never been called. What is left in the pages is what one
sequence of the kept tokens would have put there.
"""

import mlx.core as mx
from decoder import Decoder, greedy
from paged_mlx import PageTable

CONTEXT, ACTIONS = list(range(2, 40)), [41, 42, 43, 44]
TOOL_ANSWERS = [[50, 51, 52, 53, 54], None, [55, 56]]  # None: the tool fails


class Agent:
    def __init__(self, model, context, num_pages=64):
        self.model, self.pool = model, model.new_pool(num_pages)
        self.tokens, self.table = [], PageTable(page_size=self.pool.page_size)
        self.read(context)

    def read(self, tokens):
        (self.logits,) = self.model.step(self.pool, [self.table], [tokens])
        self.tokens += tokens

    def think(self, actions, length=4):
        """Follow every action for some tokens, all in one batch; keep the likeliest."""
        tables = [self.table.fork() for _ in actions]
        branches = [[action] for action in actions]
        scores = mx.zeros(len(actions))
        for _ in range(length):
            logits = self.model.step(self.pool, tables, [branch[-1:] for branch in branches])
            scores = scores + mx.max(logits, axis=-1) - mx.logsumexp(logits, axis=-1)
            for branch, token in zip(branches, mx.argmax(logits, axis=-1).tolist()):
                branch.append(token)
        in_use, copies = self.pool.allocator.num_used, sum(t.num_pages for t in tables)
        chosen = mx.argmax(scores).item()
        for table in [self.table, *tables[:chosen], *tables[chosen + 1 :]]:
            table.release()  # pages that the chosen branch reads stay
        self.table = tables[chosen]
        self.tokens += branches[chosen][:-1]  # the last token is not in the pages yet
        self.read(branches[chosen][-1:])
        print(f"{in_use} pages, {copies} if each thought were a copy; kept {branches[chosen]}")

    def call_tool(self, answer, call=(60, 61, 62, 63, 60)):
        """Write the call and read the tool's answer, or take the call back."""
        length, logits = len(self.tokens), self.logits
        self.read(list(call))
        if answer is not None:
            return self.read(answer)
        print(f"the tool failed: from {len(self.tokens)} tokens back to {length}")
        self.table.truncate(length)
        self.tokens, self.logits = self.tokens[:length], logits


def main():
    model = Decoder()
    agent = Agent(model, CONTEXT)
    for answer in TOOL_ANSWERS:
        agent.think(ACTIONS)
        agent.call_tool(answer)

    assert mx.allclose(agent.logits, model.contiguous(agent.tokens)[-1], atol=1e-4)
    kept, last = list(agent.tokens), []
    for _ in range(6):
        last.append(mx.argmax(agent.logits).item())
        agent.read(last[-1:])
    assert last == greedy(model, kept, 6)
    agent.pool.check([agent.table])
    assert agent.pool.allocator.num_used == agent.table.num_pages  # no branch has left a page
    print(f"{len(kept)} tokens kept; the answer {last} is that of one contiguous sequence")


if __name__ == "__main__":
    main()
