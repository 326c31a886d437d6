"""What requests of the adapter API carry as JSON; a field that nobody knows is an error."""

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from serve.adapters.mixing.mixture import MAX_PARTS
from serve.auth.auth import Scope
from serve.names import DEFAULT, MAX_TAG, MAX_TAGS, NAME_PATTERN


def _documented(**keywords: Any) -> Meta:
    """Bounds for the OpenAPI document alone: what breaks them is refused further down, in a sentence of its own."""
    return Meta(extra_json_schema=keywords)


Name = Annotated[str, _documented(pattern=NAME_PATTERN)]
Limit = Annotated[int | None, _documented(minimum=1, maximum=(1 << 53) - 1)]
Number = Annotated[int, Meta(ge=1)]  # of a version
# What building one baseline may generate.
MAX_BASELINE_TOKENS = 1_000_000
Effect = Annotated[float, Meta(ge=0, le=100)]  # in nats


class Fetch(Struct, frozen=True, forbid_unknown_fields=True):
    """A push as JSON: the server fetches the adapter from `source`."""

    name: Name
    source: Annotated[str, _documented(pattern="^(hf|s3|https|file|oci|mlflow|wandb-artifact)://.+")]
    promote: bool = True
    visibility: Literal["private", "shared"] | None = None
    engine: str | None = None
    why: str = ""
    probe_min_effect: Effect | None = None  # in the place of the setting
    conversion_error: Annotated[float, Meta(ge=0, le=1)] | None = None  # in the place of the setting
    probe: bool = True  # false: it may change nothing, as a LoRA does before the first step of its training
    keep: Number | None = None  # the newest versions that stay, beside those that serve
    dry_run: bool = False  # every check, and nothing is kept


class Mix(Struct, frozen=True, forbid_unknown_fields=True):
    """The body of a mixture that is kept as a version: NAME[@VERSION][:WEIGHT] each. `density` of each update's entries
    stay, where the method prunes."""

    adapters: Annotated[list[str], Meta(min_length=1, max_length=MAX_PARTS)]
    method: Literal["cat", "ties", "dare_linear", "dare_ties"] = "cat"
    density: Annotated[float, Meta(gt=0, le=1)] = 0.5
    promote: bool = True
    why: str = ""


class LoadLora(Struct, frozen=True):
    """The body of vLLM's /v1/load_lora_adapter; a field that nobody knows is passed over there."""

    lora_name: str = ""
    lora_path: str = ""
    load_inplace: bool = False
    is_3d_lora_weight: bool = False


class UnloadLora(Struct, frozen=True):
    """The body of vLLM's /v1/unload_lora_adapter."""

    lora_name: str = ""
    lora_int_id: int | None = None


class RegisterAdapter(Struct, frozen=True):
    """The body of SageMaker's POST /adapters."""

    name: Annotated[str, Meta(min_length=1)]
    src: Annotated[str, Meta(min_length=1)]
    preload: bool = True
    pin: bool = False


class Promote(Struct, frozen=True, forbid_unknown_fields=True):
    """The body of a promote."""

    version: Number
    expected_version: int | None = None
    at_once: bool = False  # skip the canary that the adapter's policy asks for
    why: str = ""


class Validate(Struct, frozen=True, forbid_unknown_fields=True):
    """The body of a validation: ids of examples, if they are at hand."""

    training_file: str | None = None  # those that the version was trained on
    validation_file: str | None = None  # held-out ones


class LoopAnswer(Struct, frozen=True, forbid_unknown_fields=True):
    """The body of a person's no."""

    why: str = ""


class Rating(Struct, frozen=True, forbid_unknown_fields=True):
    """The body of feedback: a rating from 0 to 1, or the correct answer."""

    request_id: str
    rating: Annotated[float | None, _documented(minimum=0, maximum=1)] = None
    answer: str | None = None


class BaselinePrompts(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body of a baseline: prompts, each a text or the messages of a chat, for a version or whichever is live."""

    version: Number | None = None
    prompts: Annotated[list[str | list[dict[str, Any]]], Meta(min_length=20, max_length=10_000)]
    max_tokens: Annotated[int, Meta(ge=1)] = 64

    def __post_init__(self) -> None:
        if (tokens := len(self.prompts) * self.max_tokens) > MAX_BASELINE_TOKENS:
            raise ValueError(
                f"{len(self.prompts)} prompts with up to {self.max_tokens} tokens each are {tokens} tokens, and a "
                f"baseline takes up to {MAX_BASELINE_TOKENS}: send fewer prompts, or a smaller max_tokens"
            )


class GoldenRun(Struct, frozen=True, forbid_unknown_fields=True):
    """The body of a golden run; without a version, whichever is live."""

    version: Number | None = None


class DataBuild(Struct, frozen=True, forbid_unknown_fields=True):
    """The body of a build of training data; times are in seconds since 1970."""

    since: Annotated[float, Meta(ge=0)] = 0.0
    until: Annotated[float, Meta(ge=0)] | None = None
    held_out: Annotated[float, Meta(ge=0, le=0.5)] = 0.1
    seed: Annotated[int, Meta(ge=0, lt=1 << 53)] = 0
    unrated: bool = False
    bases: bool = False
    max_examples: Annotated[int, Meta(ge=1, le=100_000)] = 10_000
    balance: Annotated[float, Meta(ge=1, le=1_000_000)] = 3.0


class Replay(Struct, frozen=True, forbid_unknown_fields=True):
    """The body of a replay: how many captured requests, how long an answer may be, and whose answers are compared."""

    requests: Annotated[int, Meta(ge=1, le=1000)] = 50
    max_tokens: Annotated[int, Meta(ge=1, le=4096)] = 256
    against: Literal["kept", "live"] = "kept"
    examples: Annotated[int, Meta(ge=0, le=100)] = 10


class ExpiresAfter(Struct, frozen=True, forbid_unknown_fields=True):
    """How long the files that a batch writes are kept."""

    seconds: Annotated[int, Meta(ge=3600, le=2_592_000)]
    anchor: Literal["created_at"]


class NewBatch(Struct, frozen=True, forbid_unknown_fields=True):
    """The body that makes a batch of a file; as OpenAI's."""

    input_file_id: str
    endpoint: str
    completion_window: str
    metadata: dict[str, str] | None = None
    output_expires_after: ExpiresAfter | None = None


Epochs = Literal["auto"] | Annotated[int, Meta(ge=1, le=50)]
BatchSize = Literal["auto"] | Annotated[int, Meta(ge=1, le=256)]
Multiplier = Literal["auto"] | Annotated[float, Meta(gt=0, le=100)]
Beta = Literal["auto"] | Annotated[float, Meta(gt=0, le=2)]


class Hyperparameters(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """How a job trains: OpenAI's numbers, and those of a LoRA."""

    n_epochs: Epochs | None = None
    batch_size: BatchSize | None = None
    learning_rate_multiplier: Multiplier | None = None
    beta: Beta | None = None  # of dpo
    learning_rate: Annotated[float, Meta(gt=0, le=1)] | None = None
    rank: Annotated[int, Meta(ge=1, le=512)] | None = None
    alpha: Annotated[int, Meta(ge=1, le=4096)] | None = None


class MethodOptions(Struct, frozen=True, forbid_unknown_fields=True):
    """What a method takes."""

    hyperparameters: Hyperparameters = Hyperparameters()


class FineTuningMethod(Struct, frozen=True, forbid_unknown_fields=True):
    """How a job trains; `reinforcement` is not here."""

    type: Literal["supervised", "dpo"]
    supervised: MethodOptions | None = None
    dpo: MethodOptions | None = None


class NewFineTuningJob(Struct, frozen=True, forbid_unknown_fields=True):
    """The body that makes a job of a file of examples; as OpenAI's."""

    model: str
    training_file: str
    validation_file: str | None = None
    suffix: str | None = None  # the adapter's name
    method: FineTuningMethod | None = None
    hyperparameters: Hyperparameters | None = None  # as earlier clients send it
    seed: Annotated[int, Meta(ge=0, le=(1 << 31) - 1)] | None = None
    metadata: dict[str, str] | None = None
    integrations: Annotated[list[Any], Meta(max_length=0)] | None = None


MachineName = Annotated[str, Meta(max_length=31)]
JobIds = Annotated[list[Annotated[str, Meta(max_length=64)]], Meta(max_length=100)]
_Count = Annotated[int, Meta(ge=0, le=(1 << 53) - 1)]
_Step = Annotated[int, Meta(ge=1, le=(1 << 31) - 1)]


class WorkAsked(Struct, frozen=True, forbid_unknown_fields=True):
    """What a worker has: base models by the digests of their bytes, and jobs that it began."""

    worker: MachineName
    bases: Annotated[list[Annotated[str, Meta(max_length=64)]], Meta(max_length=100)]
    kept: JobIds = []
    besides: JobIds = []  # that it cannot train now


class AtWork(Struct, frozen=True, forbid_unknown_fields=True):
    """Which worker it is."""

    worker: MachineName


class StepLine(Struct, frozen=True):
    """What a step measured; more than this is passed over."""

    step: _Step
    steps: _Step
    train_loss: float | None = None
    train_accuracy: float | None = None
    valid_loss: float | None = None
    valid_accuracy: float | None = None
    tokens: _Count = 0
    seconds_left: Annotated[float, Meta(ge=0, le=1e9)] | None = None
    ended: bool | None = None


class WorkProgress(Struct, frozen=True, forbid_unknown_fields=True):
    """Steps since the last time, the seconds that they ran, and hyperparameters as numbers."""

    worker: MachineName
    lines: Annotated[list[StepLine], Meta(max_length=1000)] = []
    seconds: Annotated[float, Meta(ge=0, le=86_400)] = 0.0
    n_epochs: _Count | None = None
    batch_size: _Count | None = None
    rank: _Count | None = None
    learning_rate: Annotated[float, Meta(ge=0, le=1e9)] | None = None


class WorkNote(Struct, frozen=True, forbid_unknown_fields=True):
    """Something that happened to a job's training."""

    worker: MachineName
    message: Annotated[str, Meta(max_length=1000)]
    level: Literal["info", "warn", "error"] = "info"


class WorkFailed(Struct, frozen=True, forbid_unknown_fields=True):
    """Why a job cannot come to a good end."""

    worker: MachineName
    code: Annotated[str, Meta(max_length=64)]
    message: Annotated[str, Meta(max_length=1000)]
    param: Annotated[str, Meta(max_length=64)] | None = None
    also: Annotated[list[Annotated[str, Meta(max_length=1000)]], Meta(max_length=20)] = []


class TextPart(Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="text"):
    """A part of one input; images are not taken."""

    text: str


class Moderations(Struct, frozen=True, forbid_unknown_fields=True):
    """The body of a moderation: a text, several texts, or the parts of one; as OpenAI's."""

    input: str | Annotated[list[str | TextPart], Meta(min_length=1, max_length=32)]
    model: str | None = None


class Acknowledged(Struct, frozen=True, forbid_unknown_fields=True):
    """The body that says that a version's alarms have been dealt with; by default the live one's. A base has none."""

    version: Number | None = None


class Accepted(Struct, frozen=True, forbid_unknown_fields=True):
    """The body that makes a version's recent traffic its reference: of its prompts, its answers, or both.

    By default the live version's; a base has none.
    """

    version: Number | None = None
    signals: Literal["prompt", "output", "both"] = "both"
    note: Annotated[str, Meta(max_length=500)] = ""  # why, for the history


class Weight(Struct, frozen=True, forbid_unknown_fields=True):
    """The body of a canary or a shadow: a version's share of the name's traffic; 0 ends it."""

    version: Number
    weight: Annotated[float, _documented(minimum=0, maximum=1)]
    why: str = ""


class Pin(Struct, frozen=True, forbid_unknown_fields=True):
    """The body of a pin; without a version, whichever is live stays."""

    version: Number | None = None
    why: str = ""


class Alias(Struct, frozen=True, forbid_unknown_fields=True):
    """The body of an alias: the version that NAME@ALIAS means from now on."""

    version: Number
    why: str = ""


class Tags(Struct, frozen=True, forbid_unknown_fields=True):
    """The tags of a version, in the place of those that it has."""

    tags: Annotated[list[Annotated[str, _documented(minLength=1, maxLength=MAX_TAG)]], Meta(max_length=MAX_TAGS)]
    why: str = ""


class Rename(Struct, frozen=True, forbid_unknown_fields=True):
    """The body of a rename: the name that the adapter has from now on, in the same tenant."""

    to: Name
    why: str = ""


class Visibility(Struct, frozen=True, forbid_unknown_fields=True):
    """Who may ask an adapter beside its own tenant: nobody, or everybody."""

    visibility: Literal["private", "shared"]
    why: str = ""


class Swap(Struct, frozen=True, forbid_unknown_fields=True):
    """The body of a swap: the model that takes over, as `loradock serve` takes one."""

    model: str
    force: bool = False
    drain_first: bool = False


class Rollback(Struct, frozen=True, forbid_unknown_fields=True):
    """The body of a rollback; may be left out."""

    expected_version: int | None = None
    why: str = ""


class LimitsOfKey(Struct, frozen=True, forbid_unknown_fields=True):
    """What a key may use; null is unlimited."""

    requests_per_minute: Limit = None
    tokens_per_minute: Limit = None
    concurrent: Limit = None
    adapters: Limit = None
    adapter_bytes: Limit = None
    sequences: Limit = None
    prompt_logprobs: Limit = None
    batch: Limit = None
    changes_per_minute: Limit = None
    reads_per_minute: Limit = None


class NewKey(Struct, frozen=True, forbid_unknown_fields=True):
    """The body of a key's creation."""

    name: Name
    tenant: Name = DEFAULT
    scopes: Annotated[tuple[Annotated[str, _documented(enum=list(Scope))], ...], _documented(minItems=1)] = (
        Scope.INFERENCE,
    )
    limits: LimitsOfKey = LimitsOfKey()
