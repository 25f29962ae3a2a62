"""A taskset of verifiers 0.4 and nothing else: one turn, scored by its task; there is no end to its tasks."""

from itertools import count

import verifiers.v1 as vf

__all__ = ["SumTaskset"]


class SumData(vf.TaskData):
    answer: str


class SumTask(vf.Task[SumData, vf.State, vf.TaskConfig]):
    @vf.reward(weight=2.0)
    async def right(self, trace) -> float:
        return float(trace.last_reply == self.data.answer)


class SumTaskset(vf.Taskset[SumTask, vf.TasksetConfig]):
    INFINITE = True

    def load(self):
        for n in count():
            yield SumTask(SumData(prompt=f"{n}+{n}=", answer=str(2 * n)), self.config.task)
