"""An environment of verifiers 0.4: guess a number; a program says whether it is higher or lower."""

import verifiers.v1 as vf

__all__ = ["GuessEnv", "GuessTaskset"]


class GuessData(vf.TaskData):
    answer: str


class GuessTask(vf.Task[GuessData, vf.State, vf.TaskConfig]):
    @vf.reward
    async def right(self, trace) -> float:
        return float(trace.last_reply == self.data.answer)

    @vf.metric
    async def turns(self, trace) -> float:
        return float(trace.num_turns)


class GuessConfig(vf.TasksetConfig):
    highest: int = 9
    fails: bool = False


class GuessTaskset(vf.Taskset[GuessTask, GuessConfig]):
    def load(self):
        for number in range(self.config.highest + 1):
            yield GuessTask(GuessData(prompt="Guess.", system_prompt="A digit.", answer=str(number)), self.config.task)


class GuessEnvConfig(vf.EnvConfig):
    player: vf.AgentConfig = vf.AgentConfig(max_turns=3)


class GuessEnv(vf.Env[GuessEnvConfig]):
    async def run(self, task, agents):
        async with agents.player.interaction(task) as game:
            said = await game.turn()
            while not said.terminated and said.last_reply != task.data.answer:
                if self.taskset.config.fails:
                    raise RuntimeError("the board is broken")
                said = await game.turn("higher" if said.last_reply < task.data.answer else "lower")
        game.trace.record_reward("quick", 1 / game.trace.num_turns, weight=0.5)
