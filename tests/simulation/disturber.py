"""Makes happen to a suite what its scenario says that goes wrong, and mends it."""

from tests.simulation.rpc import RELEASE
from tests.simulation.scenario import Disturbance, Fault
from tests.simulation.world import World


class Disturber:
    """Of one world."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._loop = world.loop

    def plan(self, disturbances: tuple[Disturbance, ...]) -> None:
        """Each will happen at its event, counted from now."""
        now = self._loop.num_events
        for disturbance in disturbances:
            self._loop.before_event(now + disturbance.after_events, lambda each=disturbance: self._disturb(each))  # type: ignore[misc]

    def mend(self) -> None:
        """Nothing goes wrong any more."""
        world = self._world
        self._loop.forget_plans()
        world.network.heal_all()
        world.rpc.lost_paths.clear()
        world.corruptions_due = 0
        world.freezes_due.clear()
        for name in list(world.nodes):
            world.freeze(name, False)
        world.note("requests are over; nothing goes wrong any more")

    def _disturb(self, what: Disturbance) -> None:
        world, later = self._world, self._loop.time() + what.lasts_s
        world.note(f"fault: {what.fault.value} {what.target} {what.other} {what.lasts_s or ''}")
        world.injected[what.fault.value] += 1
        match what.fault:
            case Fault.KILL:
                world.kill(what.target)
            case Fault.VANISH:
                self._vanish(what.target, later)
            case Fault.FREEZE:
                world.freeze_for(what.target, what.lasts_s)
            case Fault.FREEZE_READER:
                world.freezes_due[what.target] = what.lasts_s
            case Fault.CUT:
                ways = [(what.target, what.other)] + ([(what.other, what.target)] if what.both_ways else [])
                world.network.cut(*ways)
                self._loop.deliver(world.simulator, later, world.network.heal, *ways)
            case Fault.DRAIN:
                world.drain(what.target)
            case Fault.CORRUPT:
                world.corruptions_due += what.count
            case Fault.LOSE_RELEASES:
                world.rpc.lost_paths.add(RELEASE)
            case Fault.STEP_CLOCK:
                world.step_clock(what.target, what.count)

    def _vanish(self, name: str, later: float) -> None:
        world = self._world
        others = {*world.scenario.workers, "gateway", "c0", "c1"} - {name}
        ways = [way for other in others for way in ((name, other), (other, name))]
        world.network.cut(*sorted(ways))
        world.kill(name)
        self._loop.deliver(world.simulator, later, world.network.heal, *sorted(ways))
