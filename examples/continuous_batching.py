"""Continuous batching by hand: requests join and leave a running batch, on few pages.

    python examples/continuous_batching.py

A prompt is read in the same call in which others decode. When the pool is full, the youngest
request gives its pages back and waits; it is read again, with what it has answered, when there is
room. Each answer is that of its prompt alone.
"""

from collections import deque
from dataclasses import dataclass, field

import mlx.core as mx
from decoder import Decoder, greedy
from paged_mlx import OutOfPages, PageTable

NUM_PAGES, PAGE_SIZE, MAX_BATCH = 10, 4, 4


@dataclass
class Request:
    prompt: list[int]
    length: int
    answer: list[int] = field(default_factory=list)
    table: PageTable = field(default_factory=lambda: PageTable(page_size=PAGE_SIZE))

    @property
    def unread(self):
        """Tokens that are not in pages yet: a whole prompt, or the newest token."""
        return (self.prompt + self.answer)[len(self.table) :]


class Scheduler:
    def __init__(self, model, num_pages):
        self.model, self.pool = model, model.new_pool(num_pages, PAGE_SIZE)
        self.waiting, self.running = deque(), []
        self.num_preempted = 0

    def admit(self):
        """Let requests join while there is a page for each row, and pages for what they read."""
        free = self.pool.allocator.num_free - len(self.running)
        while self.waiting and len(self.running) < MAX_BATCH:
            free -= len(self.waiting[0].unread) // PAGE_SIZE + 1
            if free < 0:
                break
            self.running.append(self.waiting.popleft())

    def step(self):
        self.admit()
        while True:
            tables = [request.table for request in self.running]
            new_tokens = [request.unread for request in self.running]
            try:
                logits = self.model.step(self.pool, tables, new_tokens)
                break
            except OutOfPages:  # nothing has changed: make room and ask again
                if len(self.running) == 1:
                    raise  # it does not fit alone
                youngest = self.running.pop()
                youngest.table.release()
                self.waiting.appendleft(youngest)
                self.num_preempted += 1
        sizes = [len(tokens) for tokens in new_tokens]
        print(f"read {sizes} tokens, {self.pool.allocator.num_used} of {NUM_PAGES} pages")
        for request, token in zip(self.running, mx.argmax(logits, axis=-1).tolist()):
            request.answer.append(token)
            if len(request.answer) == request.length:
                request.table.release()
        self.running = [r for r in self.running if len(r.answer) < r.length]


def main():
    model = Decoder()
    lengths = [(9, 12), (3, 6), (14, 9), (1, 16), (6, 5), (11, 8), (2, 10)]
    requests = [
        Request([(7 * i + 3 * j) % 64 for j in range(prompt)], answer)
        for i, (prompt, answer) in enumerate(lengths)
    ]
    scheduler = Scheduler(model, NUM_PAGES)
    scheduler.waiting.extend(requests)
    while scheduler.waiting or scheduler.running:
        scheduler.step()

    for request in requests:
        assert request.answer == greedy(model, request.prompt, request.length)
    assert scheduler.num_preempted > 0 and scheduler.pool.allocator.num_used == 0
    print(f"{len(requests)} answers as alone; requests that made room: {scheduler.num_preempted}")


if __name__ == "__main__":
    main()
