"""What `python -m gateway` can be told."""

from dataclasses import dataclass, field

from gateway.admission import AdmissionLimits
from gateway.relay import Patience
from gateway.routing import Role
from gateway.service import RequestLimits
from gateway.targets import Target, parse_target
from tandem.models import DEFAULT_MODEL
from tandem.server import ServerSettings

_TARGETS_HELP = "addresses of {} workers, host:port or dns:///name:port"


@dataclass(frozen=True)
class GatewayServerSettings(ServerSettings):
    """Clients expect the gateway at a port that they know."""

    port: int = field(default=50051, metadata={"help": "port to listen on; 0 takes a free one", "minimum": 0, "maximum": 65535})


@dataclass(frozen=True)
class GatewaySettings:
    """Settings of the gateway. Raises ValueError if a target is malformed."""

    model: str = field(default=DEFAULT_MODEL, metadata={"help": "model name, path, or hub name"})
    prefill_targets: tuple[str, ...] = field(default=("127.0.0.1:50061",), metadata={"help": _TARGETS_HELP.format("prefill")})
    decode_targets: tuple[str, ...] = field(default=("127.0.0.1:50071",), metadata={"help": _TARGETS_HELP.format("decode")})
    max_running: int = field(default=256, metadata={"help": "most requests running at once; more wait", "minimum": 1})
    max_queued: int = field(default=1024, metadata={"help": "most requests waiting; more are refused", "minimum": 0})
    max_queued_tokens: int = field(
        default=1_000_000, metadata={"help": "most prompt tokens of waiting requests; more are refused", "minimum": 0}
    )
    max_wait_s: float = field(
        default=300.0,
        metadata={
            "help": "seconds; requests that would wait longer for their turn are refused, and those that would wait for half of "
            "the time that their deadline leaves",
            "minimum": 0.001,
        },
    )
    max_deadline_s: float = field(
        default=3600.0, metadata={"help": "longest time for a request, also without a deadline, in seconds", "minimum": 0.001}
    )
    stall_limit_s: float = field(
        default=30.0, metadata={"help": "seconds that a client may take nothing before its stream ends", "minimum": 0.001}
    )
    resume_wait_s: float = field(
        default=10.0, metadata={"help": "seconds that a broken completion waits for a worker to go on with", "minimum": 0}
    )
    server: GatewayServerSettings = field(default_factory=GatewayServerSettings)

    def __post_init__(self) -> None:
        for text in (*self.prefill_targets, *self.decode_targets):
            parse_target(text)

    @property
    def targets(self) -> list[tuple[Role, Target]]:
        prefills = [(Role.PREFILL, parse_target(text)) for text in self.prefill_targets]
        return prefills + [(Role.DECODE, parse_target(text)) for text in self.decode_targets]

    @property
    def admission(self) -> AdmissionLimits:
        return AdmissionLimits(self.max_running, self.max_queued, self.max_queued_tokens, self.max_wait_s)

    @property
    def patience(self) -> Patience:
        return Patience(after_first_token_s=self.resume_wait_s)

    @property
    def requests(self) -> RequestLimits:
        return RequestLimits(self.max_deadline_s, self.stall_limit_s)
