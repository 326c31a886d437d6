"""The registry's tables. What they mean: see registry.registry; the database: registry.database."""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    false,
    func,
    select,
)

# The schema that this release knows, and the oldest one whose servers may share a database with it: the database has
# the latter. A table, a column that is empty or has a default, and a longer text change neither: servers of the release
# before do not mind them. What they would mind takes two releases: one that does without, and one that raises OLDEST.
SCHEMA, OLDEST = 8, 6

metadata = MetaData()
_Id = BigInteger().with_variant(Integer, "sqlite")

schema_version = Table("schema_version", metadata, Column("version", Integer, primary_key=True, autoincrement=False))

names = Table(
    "names",
    metadata,
    Column("id", _Id, primary_key=True, autoincrement=True),
    Column("name", String(129), nullable=False, unique=True),  # NAME or TENANT/NAME
    Column("live", Integer),
    Column("trail", Text, nullable=False),  # JSON: versions that were live before, the latest last
    Column("next", Integer, nullable=False),  # a number is never given twice, also after a deletion
    Column("shared", Boolean, nullable=False, server_default=false()),  # other tenants may ask it too
    Column("canary_version", Integer),
    Column("canary_weight", Float(53)),
    Column("shadow_version", Integer),
    Column("shadow_weight", Float(53)),
    Column("pinned", Integer),  # 0: whichever version is live
    Column("base", String(256)),  # the name of the base model that it runs on; null: the server's first
    Column("aliases", Text),  # JSON: a fixed name -> the version that it points at
    Column("moved_to", String(129)),  # of a name that was given up: the one that its adapter has now
)

versions = Table(
    "versions",
    metadata,
    Column("name_id", _Id, ForeignKey("names.id"), primary_key=True),
    Column("version", Integer, primary_key=True, autoincrement=False),
    Column("digest", String(64), nullable=False, index=True),
    Column("rank", Integer, nullable=False),
    Column("base", Text),
    Column("target_modules", Text, nullable=False),  # JSON
    Column("nbytes", BigInteger, nullable=False),
    Column("tensors", Integer, nullable=False),
    Column("created", Float(53), nullable=False),
    Column("checks", Text),  # JSON: what was measured when it was pushed
    Column("tags", Text),  # JSON: a list of texts
    UniqueConstraint("name_id", "digest"),
)

history = Table(
    "history",
    metadata,
    Column("id", _Id, primary_key=True, autoincrement=True),
    Column("name_id", _Id, ForeignKey("names.id"), nullable=False, index=True),
    Column("who", Text, nullable=False),
    Column("what", String(16), nullable=False),
    Column("why", Text, nullable=False),
    Column("when", Float(53), nullable=False),
    Column("from_version", Integer),
    Column("to_version", Integer),
    Column("digest", String(64)),
    Column("weight", Float(53)),
    Column("label", Text),  # the alias that moved, or the tags that were set
    sqlite_autoincrement=True,
)

keys = Table(
    "keys",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("tenant", String(64), nullable=False),
    Column("name", String(64), nullable=False),
    Column("digest", String(64), nullable=False, unique=True),  # sha256 of the secret, which is nowhere
    Column("scopes", Text, nullable=False),  # JSON
    Column("limits", Text, nullable=False),  # JSON
    Column("created", Float(53), nullable=False),
    Column("revoked", Float(53)),
)

subjects = Table(
    "subjects",  # who came with a token of the identity provider of late (serve.auth.subjects)
    metadata,
    Column("id", String(32), primary_key=True),
    Column("tenant", String(64), nullable=False),
    Column("name", Text, nullable=False),
    Column("scopes", Text, nullable=False),  # JSON
    Column("seen", Float(53), nullable=False),
)

replicas = Table(
    "replicas",  # who shares this registry, how far each has read it, and what it has to do (serve.fleet.heartbeat)
    metadata,
    Column("id", String(64), primary_key=True),
    Column("node", Text, nullable=False),
    Column("phase", String(16), nullable=False),
    Column("generation", BigInteger, nullable=False),  # of the snapshot that it answers from
    Column("seen", Float(53), nullable=False),
    Column("address", Text),  # where other servers send requests on to; null: nowhere
    Column("report", Text),  # JSON: what it holds and has to do (serve.fleet.membership)
    Column("key_use", Text),  # JSON: what keys with limits have used of late (serve.auth.shared_limits)
    Column("messages_read", BigInteger),  # the last one of `server_messages`; null: it reads none
)

server_messages = Table(
    "server_messages",  # what servers ask of one another (serve.fleet.server_messages)
    metadata,
    Column("id", _Id, primary_key=True, autoincrement=True),
    Column("sender", String(64), nullable=False),
    Column("kind", String(16), nullable=False),
    Column("content", Text, nullable=False),  # JSON
    Column("when", Float(53), nullable=False),
    Column("answer", Text),  # JSON; empty: somebody is about to answer
    sqlite_autoincrement=True,
)

canary_analyses = Table(
    "canary_analyses",  # analyses of canaries that servers began, each of which may spend a part of alpha
    metadata,
    Column("name_id", _Id, ForeignKey("names.id"), primary_key=True),
    Column("live", Integer, primary_key=True, autoincrement=False),
    Column("canary", Integer, primary_key=True, autoincrement=False),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("server", String(64), nullable=False),
    Column("when", Float(53), nullable=False),
)

bases = Table(
    "bases",
    metadata,
    Column("name", String(256), primary_key=True),
    Column("configured", Text, nullable=False),
    Column("model", Text, nullable=False),
    Column("who", Text, nullable=False),
    Column("when", Float(53), nullable=False),
)

swap_announcements = Table(
    "swap_announcements",  # swaps of bases that are about to be (serve.rollout.swap_together)
    metadata,
    Column("base", String(256), primary_key=True),
    Column("model", Text, nullable=False),
    Column("server", String(64), nullable=False),
    Column("when", Float(53), nullable=False),
)

swap_followers = Table(
    "swap_followers",  # the servers that prepare for them
    metadata,
    Column("base", String(256), primary_key=True),
    Column("server", String(64), primary_key=True),
    Column("state", String(16), nullable=False),
)

golden_sets = Table(
    "golden_sets",
    metadata,
    Column("name_id", _Id, ForeignKey("names.id"), primary_key=True),
    Column("digest", String(32), nullable=False),  # of the cases
    Column("document", Text, nullable=False),  # JSON: the set as it was put
    Column("who", Text, nullable=False),
    Column("when", Float(53), nullable=False),
    Column("stamp", BigInteger, nullable=False),  # counts changes of its outcomes
    Column("claimed_by", String(64)),  # the server that runs it
    Column("claimed_until", Float(53)),
    Column("verdict", String(64)),  # the last one that was announced: LIVE:CANARY
    Column("key", String(64)),  # the id of the API key that put it
)

golden_outcomes = Table(
    "golden_outcomes",
    metadata,
    Column("name_id", _Id, ForeignKey("names.id"), primary_key=True),
    Column("digest", String(64), primary_key=True),  # of the version's bytes
    Column("case", String(32), primary_key=True),
    Column("basis", Text, nullable=False),  # the base model, and who judged
    Column("result", String(8), nullable=False),
    Column("score", Float(53)),
    Column("first_score", Float(53)),
    Column("runs", Integer, nullable=False),
    Column("changed", Integer, nullable=False),  # runs whose answer was another than the one before
    Column("answer", Text, nullable=False),
    Column("detail", Text, nullable=False),
    Column("when", Float(53), nullable=False),
)

golden_runs = Table(
    "golden_runs",
    metadata,
    Column("id", _Id, primary_key=True, autoincrement=True),
    Column("name_id", _Id, ForeignKey("names.id"), nullable=False, index=True),
    Column("version", Integer, nullable=False),
    Column("digest", String(64), nullable=False),
    Column("set", String(32), nullable=False),
    Column("reason", String(16), nullable=False),
    Column("began", Float(53), nullable=False),
    Column("ended", Float(53), nullable=False),
    Column("asked", Integer, nullable=False),
    Column("cases", Integer, nullable=False),  # with a score
    Column("score", Float(53)),
    Column("low", Float(53)),
    Column("high", Float(53)),
)

golden_promotions = Table(
    "golden_promotions",  # versions that become live once their score is good enough
    metadata,
    Column("name_id", _Id, ForeignKey("names.id"), primary_key=True),
    Column("version", Integer, nullable=False),
    Column("who", Text, nullable=False),
    Column("why", Text, nullable=False),
    Column("when", Float(53), nullable=False),
)

usage = Table(
    "usage",
    metadata,
    Column("day", String(10), primary_key=True),  # YYYY-MM-DD, by UTC
    Column("tenant", String(64), primary_key=True),  # who asked
    Column("adapter", String(256), primary_key=True),  # NAME or TENANT/NAME, or a base's name
    Column("requests", BigInteger, nullable=False),
    Column("prompt_tokens", BigInteger, nullable=False),
    Column("cached_tokens", BigInteger, nullable=False),
    Column("generated_tokens", BigInteger, nullable=False),
    Column("engine_seconds", Float(53), nullable=False),
    Column("cost", Float(53), nullable=False),
)

usage_causes = Table(
    "usage_causes",  # what the rows of `usage` were for
    metadata,
    *(column._copy() for column in usage.primary_key),
    Column("cause", String(16), primary_key=True),
    *(column._copy() for column in usage.c if not column.primary_key),
)

usage_writes = Table(
    "usage_writes",  # pieces of usage that were added, so that a piece whose answer was lost is not added again
    metadata,
    Column("id", String(32), primary_key=True),
    Column("when", Float(53), nullable=False),
)

files = Table(
    "files",  # what clients sent to be answered in batches, and what was answered; the bytes are no part of it
    metadata,
    Column("id", String(64), primary_key=True),
    Column("tenant", String(64), nullable=False, index=True),
    Column("who", Text, nullable=False),
    Column("purpose", String(32), nullable=False),
    Column("filename", Text, nullable=False),
    Column("nbytes", BigInteger, nullable=False),
    Column("created", Float(53), nullable=False),
    Column("expires", Float(53), nullable=False),
)

batches = Table(
    "batches",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("tenant", String(64), nullable=False, index=True),
    Column("key", String(32), nullable=False),  # the id of the key that made it; "" on a server without keys
    Column("who", Text, nullable=False),
    Column("status", String(16), nullable=False, index=True),
    Column("endpoint", String(64), nullable=False),
    Column("input_file", String(64), nullable=False),
    Column("completion_window", String(16), nullable=False),
    Column("metadata", Text, nullable=False),  # JSON
    Column("created", Float(53), nullable=False),
    Column("expires", Float(53), nullable=False),
    Column("file_seconds", Float(53), nullable=False),  # for which its output is kept
    Column("times", Text, nullable=False),  # JSON: when it came to which status
    Column("errors", Text, nullable=False),  # JSON: what is wrong with the input
    Column("total", Integer, nullable=False),
    Column("completed", Integer, nullable=False),
    Column("failed", Integer, nullable=False),
    Column("prompt_tokens", BigInteger, nullable=False),
    Column("cached_tokens", BigInteger, nullable=False),
    Column("generated_tokens", BigInteger, nullable=False),
    Column("output_file", String(64)),
    Column("error_file", String(64)),
    Column("claimed_by", String(64)),  # the server that runs it
    Column("claimed_until", Float(53)),
)

batch_answers = Table(
    "batch_answers",  # of batches that an earlier loradock began: since then they are parts
    metadata,
    Column("batch", String(64), ForeignKey("batches.id"), primary_key=True),
    Column("line", Integer, primary_key=True, autoincrement=False),
    Column("completed", Boolean, nullable=False),  # or failed
    Column("answer", Text, nullable=False),  # a line of the output
)

batch_parts = Table(
    "batch_parts",  # files of answers of batches that are not at their end (serve.jobs.batches.answers)
    metadata,
    # A release that knows no parts deletes batches too.
    Column("batch", String(64), ForeignKey("batches.id", ondelete="CASCADE"), primary_key=True),
    Column("name", String(64), primary_key=True),
    Column("nbytes", BigInteger, nullable=False),  # that count
)

finetune_jobs = Table(
    "finetune_jobs",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("tenant", String(64), nullable=False, index=True),
    Column("status", String(20), nullable=False, index=True),
    Column("created", Float(53), nullable=False),
    Column("training_file", String(64), nullable=False),
    Column("validation_file", String(64)),
    Column("asked", Text, nullable=False),  # JSON: what it is to do, which never changes
    Column("state", Text, nullable=False),  # JSON: how far it is
    Column("claimed_by", String(64)),  # the server that runs it
    Column("claimed_until", Float(53)),
)

# A tenant's lists are read in this order, a part at a time.
for _listed in (files, batches, finetune_jobs):
    Index(f"ix_{_listed.name}_listed", _listed.c.tenant, _listed.c.created, _listed.c.id)

# The statuses of jobs that are at their end.
FINETUNE_ENDS = ("succeeded", "failed", "cancelled")

finetune_notes = Table(
    "finetune_notes",  # events and checkpoints of jobs
    metadata,
    Column("job", String(64), ForeignKey("finetune_jobs.id"), primary_key=True),
    Column("kind", String(16), primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),  # of a checkpoint its step
    Column("when", Float(53), nullable=False),
    Column("content", Text, nullable=False),  # JSON
)


loops = Table(
    "loops",  # one row an adapter whose next version may be made by itself
    metadata,
    Column("id", String(64), primary_key=True),
    Column("name_id", _Id, ForeignKey("names.id"), unique=True),  # null: the row that stops all of them
    Column("status", String(16), nullable=False),  # its phase
    Column("state", Text, nullable=False),  # JSON: how far it is
    Column("wish", Text),  # JSON: what somebody asked of it, until it is done
    Column("stopped", Text),  # who stopped it
    Column("claimed_by", String(64)),  # the server that drives it
    Column("claimed_until", Float(53)),
)

loop_tries = Table(
    "loop_tries",
    metadata,
    Column("loop", String(64), ForeignKey("loops.id"), primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("began", Float(53), nullable=False),
    Column("ended", Float(53)),
    Column("outcome", String(16)),
    Column("alpha", Float(53), nullable=False),  # what it spends of the month's
    Column("content", Text, nullable=False),  # JSON: what opened it, and its evidence
)

loop_references = Table(
    "loop_references",  # held-out examples of the adapter's traffic, which nobody trains on
    metadata,
    Column("id", String(64), primary_key=True),
    Column("loop", String(64), ForeignKey("loops.id"), nullable=False, index=True),
    Column("number", Integer, nullable=False),  # of the try that held them out; its candidate is not live yet where
    Column("label", Text),  # this is null: a reference is what a promoted version was proved on
    Column("made", Float(53), nullable=False),
    Column("examples", Integer, nullable=False),
    Column("score", Float(53)),  # the mean score of the version that became live with it
    Column("document", Text, nullable=False),  # JSON: a list of examples
    Column("clusters", Text),  # JSON: a number for each example, the same for those that count as one
)

loop_deletions = Table(
    "loop_deletions",  # examples whose conversation was deleted, which files from before may hold still
    metadata,
    Column("tenant", String(64), primary_key=True),
    Column("digest", String(32), primary_key=True),
    Column("until", Float(53), nullable=False),  # by then those files are gone
)

deleted_conversations = Table(
    "deleted_conversations",  # whose requests each server deletes that kept some (serve.dataset.deleted_conversations)
    metadata,
    Column("id", _Id, primary_key=True, autoincrement=True),
    Column("tenant", String(64), nullable=False),
    Column("conversation", String(64), nullable=False),
    Column("requests", Text, nullable=False),  # JSON: their ids
    Column("turns", Text, nullable=False),  # JSON: digests of what was said by the end of each answer
    Column("until", Float(53), nullable=False),  # by then no server keeps any of them
    sqlite_autoincrement=True,
)

held_out = Table(
    "held_out",  # what builds of an adapter held out (serve.dataset.held_out)
    metadata,
    Column("id", _Id, primary_key=True, autoincrement=True),
    Column("adapter", String(24), nullable=False, index=True),  # a digest of its full name
    Column("conversation", String(64), nullable=False, index=True),
    Column("moment", Float(53), nullable=False),
    Column("exact", String(64), nullable=False),  # of the question
    Column("sketch", Text, nullable=False),  # JSON
    sqlite_autoincrement=True,
)

LATEST = select(func.max(history.c.id))  # the generation
