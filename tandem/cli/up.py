"""`tandem up`: the whole suite on this machine."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import Coroutine, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rich.text import Text

from tandem.addresses import listen
from tandem.api.v1 import model_pb2, operations_pb2
from tandem.cli.client import QUICK_S, Gateway, connect, exit_on_error
from tandem.cli.generate import ask
from tandem.cli.placement import Placement
from tandem.cli.plan import Member, SuitePlan, plan_members
from tandem.cli.pull import fetch
from tandem.cli.readiness import wait_serving
from tandem.cli.requests import SamplingOptions, Turn, make_request
from tandem.cli.status import get_suite, suite_table, workers_table
from tandem.cli.suite_view import StartView, choose_transport
from tandem.cli.terminal import CommandError, notes, output
from tandem.models import ModelFiles, writable_cache_directory
from tandem.supervisor import ChildFailedError, Supervisor

_POLL_S = 0.1
_PLACED_S = 30.0
_FIRST_QUESTION = "In one or two sentences: why is the sky blue?"
_ANSWER_TOKENS = 128


@dataclass(frozen=True)
class UpOptions:
    """What `tandem up` was told."""

    plan: SuitePlan
    questions: tuple[str, ...] = ()
    once: bool = False
    verbose: bool = False

    @property
    def all_questions(self) -> tuple[str, ...]:
        """`--once` without a question asks one of ours, so that there is an answer to stop after."""
        return self.questions or ((_FIRST_QUESTION,) if self.once else ())


def run_up(options: UpOptions) -> None:
    with exit_on_error():
        _check_port(options.plan)
        files = fetch(options.plan.model)
        try:
            if options.plan.placement.reason:
                notes().print(Text(_seating(options.plan.placement), style="dim"), soft_wrap=True)
            asyncio.run(_Suite(options, files).serve())
        except ChildFailedError as error:
            raise _for_good(error) from error


def _check_port(plan: SuitePlan) -> None:
    try:
        listen(plan.host, plan.port).close()
    except OSError as error:
        advice = "Is a suite running already (`tandem status`)? Else choose another port: `tandem up --port 50052`."
        raise CommandError(f"The gateway cannot listen on {plan.host}:{plan.port}: {error.strerror}.", advice) from error


def _for_good(error: ChildFailedError) -> CommandError:
    said = "\n".join(f"  {line}" for line in error.last_lines[-12:]) or "  (nothing)"
    return CommandError(f"{error}, and is given up. Its last lines:\n{said}", f"All of its log: {error.log_path}")


def _seating(placement: Placement) -> str:
    """Which worker computes on what, and why."""
    seats = [f"prefill on {', '.join(str(seat.device) for seat in placement.prefill)}"]
    seats.append(f"decode on {', '.join(str(seat.device) for seat in placement.decode)}")
    return f"{'; '.join(seats)} ({placement.reason})"


class _Suite:
    """One run of `tandem up`."""

    def __init__(self, options: UpOptions, files: ModelFiles) -> None:
        self._options = options
        self._plan = options.plan
        self._files = files
        self._members = plan_members(options.plan)
        self._begin = time.monotonic()
        self._view = StartView(notes(), (member.spec.name for member in self._members), options.verbose)
        self._watchers: set[asyncio.Task[None]] = set()

    async def serve(self) -> None:
        """Start, serve until a signal or the last answer, and stop in order. Raises ChildFailedError."""
        logs = writable_cache_directory() / "logs" / f"port-{self._plan.port}"
        supervisor = Supervisor([member.spec for member in self._members], logs, self._view)
        with _stop_signal(supervisor) as stopped:
            async with supervisor:
                await _first_of(self._work(), supervisor.wait_failed(), stopped.wait())
                notes().print("stopping …", style="dim")
                self._view.on_restart = None
        notes().print("All processes have ended.", style="dim")

    async def _work(self) -> None:
        """Returns when there is nothing left to do: after the answers with --once, else never."""
        with self._view:
            await asyncio.gather(*(self._wait_member(member) for member in self._members))
            suite = await self._wait_placed()
        self._view.on_restart = self._watch_restart
        await self._describe(suite)
        await self._ask()
        if not self._options.once:
            notes().print("Serving until Ctrl-C.", style="bold")
            await asyncio.Event().wait()

    async def _wait_member(self, member: Member) -> None:
        await wait_serving(member)
        self._view.serving(member.spec.name)

    async def _wait_placed(self) -> operations_pb2.GetSuiteResponse:
        """The suite once the gateway sees every worker ready, which takes moments once each of them serves."""
        deadline = time.monotonic() + _PLACED_S
        async with connect(self._plan.address) as gateway:
            while True:
                suite = await get_suite(gateway)
                if sum(worker.ready for worker in suite.workers) == len(self._members) - 1:
                    return suite
                if time.monotonic() > deadline:
                    notes().print(suite_table(self._plan.address, suite))
                    raise CommandError("All processes serve, but the gateway cannot use every worker.", "See the gateway's log.")
                await asyncio.sleep(_POLL_S)

    async def _describe(self, suite: operations_pb2.GetSuiteResponse) -> None:
        console = notes()
        async with connect(self._plan.address) as gateway:
            model = await _get_model(gateway)
        console.print(f"\n[bold green]Tandem serves[/] [bold]{model.name}[/] after {time.monotonic() - self._begin:.1f} s")
        console.print(
            Text(f"{self._files.path or 'random weights'} · context {model.context_tokens} tokens", style="dim"), soft_wrap=True
        )
        console.print(Text.assemble(("gateway", "bold"), f" {self._plan.address} (gRPC)"))
        console.print(workers_table(suite))
        for line in _weight_reasons(suite.workers):
            console.print(line, soft_wrap=True)
        name, reason = _transport(suite.workers)
        console.print(Text.assemble(("hand-off", "bold"), f" over {name}: {reason}"), soft_wrap=True)
        console.print(self._examples())

    def _examples(self) -> Text:
        where = "" if self._plan.port == SuitePlan.port else f" -a {self._plan.address}"
        lines = (f'tandem generate "Why is the sky blue?"{where}', f"tandem chat{where}", f"tandem status --watch{where}")
        return Text("\nTry:\n" + "\n".join(f"  {line}" for line in lines) + "\n")

    async def _ask(self) -> None:
        async with connect(self._plan.address) as gateway:
            chat = (await _get_model(gateway)).chat_capable
            for question in self._options.all_questions:
                output().print(Text(f"> {question}", style="bold cyan"), soft_wrap=True)
                prompt = [Turn("user", question)] if chat else question
                await ask(gateway, make_request(prompt, SamplingOptions(_ANSWER_TOKENS, 0.0)))

    def _watch_restart(self, name: str) -> None:
        member = next(member for member in self._members if member.spec.name == name)
        task = asyncio.create_task(self._tell_recovery(member))
        self._watchers.add(task)
        task.add_done_callback(self._watchers.discard)

    async def _tell_recovery(self, member: Member) -> None:
        await wait_serving(member)
        notes().print(f"{member.spec.name} serves again", style="green")


async def _get_model(gateway: Gateway) -> model_pb2.Model:
    response: model_pb2.GetModelResponse = await gateway.models.GetModel(model_pb2.GetModelRequest(), timeout=QUICK_S)
    return response.model


def _weight_reasons(workers: Sequence[operations_pb2.WorkerSummary]) -> list[Text]:
    """Why each role has its weight format; workers of a role that agree share a line."""
    roles = {operations_pb2.WORKER_ROLE_PREFILL: "prefill", operations_pb2.WORKER_ROLE_DECODE: "decode"}
    told = {(worker.role, worker.weight_format, worker.weight_format_reason): None for worker in workers}
    return [
        Text.assemble((f"{roles[role]} weights", "bold"), f" {format}: {reason}")
        for role, format, reason in sorted(told)
        if reason and role in roles
    ]


def _transport(workers: Sequence[operations_pb2.WorkerSummary]) -> tuple[str, str]:
    def of(role: operations_pb2.WorkerRole) -> list[Sequence[str]]:
        return [worker.transports for worker in workers if worker.role == role]

    return choose_transport(of(operations_pb2.WORKER_ROLE_PREFILL), of(operations_pb2.WORKER_ROLE_DECODE))


@contextlib.contextmanager
def _stop_signal(supervisor: Supervisor) -> Iterator[asyncio.Event]:
    """An event set by the first SIGINT, SIGTERM or SIGHUP; a second signal kills the children at once."""
    event, loop = asyncio.Event(), asyncio.get_running_loop()
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def on_signal() -> None:
        if event.is_set():
            supervisor.kill()
        event.set()

    for number in numbers:
        loop.add_signal_handler(number, on_signal)
    try:
        yield event
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)


async def _first_of(*works: Coroutine[Any, Any, object]) -> None:
    """Run all until the first ends; raise what it raised; cancel the others."""
    tasks = [asyncio.create_task(work) for work in works]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
