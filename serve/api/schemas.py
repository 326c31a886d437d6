"""What requests of the adapter API carry as JSON; a field that nobody knows is an error."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt

from serve.auth.auth import Scope
from serve.names import DEFAULT


class Fetch(BaseModel):
    """A push as JSON: the server fetches the adapter from `source`."""

    model_config = ConfigDict(extra="forbid")
    name: str
    source: str
    promote: bool = True
    visibility: Literal["private", "shared"] | None = None
    engine: str | None = None
    why: str = ""


class Promote(BaseModel):
    """The body of a promote."""

    model_config = ConfigDict(extra="forbid")
    version: PositiveInt
    expected_version: int | None = None
    # Skip the canary that the adapter's policy asks for.
    at_once: bool = False
    why: str = ""


class Rating(BaseModel):
    """The body of feedback: a rating from 0 to 1, or the correct answer."""

    model_config = ConfigDict(extra="forbid")
    request_id: str
    rating: float | None = None
    answer: str | None = None


class Rehearsed(BaseModel):
    """The body of a baseline: prompts, each a text or the messages of a chat, for a version or whichever is live."""

    model_config = ConfigDict(extra="forbid")
    version: PositiveInt | None = None
    prompts: list[str | list[dict[str, Any]]] = Field(min_length=20, max_length=10_000)
    max_tokens: PositiveInt = 64


class Acknowledged(BaseModel):
    """The body that says that a version's alarms have been dealt with."""

    model_config = ConfigDict(extra="forbid")
    version: PositiveInt


class Weight(BaseModel):
    """The body of a canary or a shadow: a version's share of the name's traffic; 0 ends it."""

    model_config = ConfigDict(extra="forbid")
    version: PositiveInt
    weight: float
    why: str = ""


class Pin(BaseModel):
    """The body of a pin; without a version, whichever is live stays."""

    model_config = ConfigDict(extra="forbid")
    version: PositiveInt | None = None
    why: str = ""


class Visibility(BaseModel):
    """Who may ask an adapter beside its own tenant: nobody, or everybody."""

    model_config = ConfigDict(extra="forbid")
    visibility: Literal["private", "shared"]
    why: str = ""


class Swap(BaseModel):
    """The body of a swap: the model that takes over, as `loradock serve` takes one."""

    model_config = ConfigDict(extra="forbid")
    model: str
    force: bool = False
    drain_first: bool = False


class Rollback(BaseModel):
    """The body of a rollback; may be left out."""

    model_config = ConfigDict(extra="forbid")
    expected_version: int | None = None
    why: str = ""


class LimitsOfKey(BaseModel):
    """What a key may use; null is unlimited."""

    model_config = ConfigDict(extra="forbid", strict=True)
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrent: int | None = None
    adapters: int | None = None
    adapter_bytes: int | None = None


class NewKey(BaseModel):
    """The body of a key's creation."""

    model_config = ConfigDict(extra="forbid")
    name: str
    tenant: str = DEFAULT
    scopes: list[str] = [Scope.INFERENCE]
    limits: LimitsOfKey = LimitsOfKey()
