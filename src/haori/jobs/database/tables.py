"""The tables of the service's database, the same for SQLite and PostgreSQL.

Times are seconds since 1970 (UTC). What is large (uploaded files, logs, metrics, weights) is kept in files, and a row
names their folder. What users see of a row, and when it changes, is the business of the store that owns it.
"""

from sqlalchemy import (
    JSON,
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
)

__all__ = [
    "checkpoints",
    "deliveries",
    "events",
    "files",
    "jobs",
    "metadata",
    "models",
    "request_keys",
    "sampling_sessions",
    "sessions",
    "training_runs",
    "upload_parts",
    "uploads",
    "webhooks",
    "workers",
]

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)

_Number = BigInteger().with_variant(Integer, "sqlite")  # SQLite counts up only what is called INTEGER

jobs = Table(
    "jobs",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("owner", String(128), nullable=False),
    Column("kind", String(32), nullable=False),
    Column("state", String(16), nullable=False, doc="queued, running, paused, succeeded, failed or cancelled"),
    Column("priority", Integer, nullable=False, default=0),
    Column("created", Float, nullable=False),
    Column("not_before", Float, nullable=False, default=0.0),
    Column("started", Float),
    Column("ended", Float),
    Column("worker", String(128)),
    Column("lease_until", Float, doc="on the clock of leases: see jobs/queue/clock.py"),
    Column("fence", Integer, nullable=False, default=0),
    Column("attempts", Integer, nullable=False, default=0),
    Column("max_attempts", Integer, nullable=False, default=3),
    Column("cancel", Boolean, nullable=False, default=False),
    Column("pause", Boolean, nullable=False, default=False),
    Column("spec", JSON, nullable=False, doc="what the job is to do, as its kind reads it"),
    Column("device", String(16), doc="that it needs; null for any"),
    Column("memory_bytes", BigInteger, doc="that it needs; null for not known"),
    Column("folder", Text, nullable=False, doc="relative to the folder of jobs"),
    Column("idempotency_key", String(255)),
    Column("rows", BigInteger, nullable=False, default=0, doc="training rows, for quotas and estimates"),
    Column("tokens", BigInteger, nullable=False, default=0, doc="tokens to be trained on; those trained, at the end"),
    Column("progress", JSON, doc="step, of, seconds_left: the latest, replaced in place"),
    Column("result", JSON),
    Column("error", JSON, doc="sentence and kind"),
    UniqueConstraint("owner", "idempotency_key"),
    Index("ix_jobs_claim", "state", "owner", "priority", "created", "not_before", "device", "memory_bytes", "id"),
    Index(None, "owner", "created"),
    Index(None, "owner", "started"),
)

workers = Table(
    "workers",
    metadata,
    Column("name", String(128), primary_key=True),
    Column("device", String(16), nullable=False, doc="the best that it has"),
    Column("memory_bytes", BigInteger),
    Column("seen_until", Float, nullable=False, doc="on the clock of leases; gone when it is past"),
)

events = Table(
    "events",
    metadata,
    Column("number", _Number, primary_key=True, autoincrement=True, doc="counts over all jobs, for streams"),
    Column("job_id", String(64), ForeignKey("jobs.id", ondelete="CASCADE"), nullable=False),
    Column("n", Integer, nullable=False, doc="counts from 1 within the job"),
    Column("at", Float, nullable=False),
    Column("level", String(8), nullable=False, doc="info, warn or error"),
    Column("type", String(16), nullable=False, doc="message or metrics"),
    Column("message", Text, nullable=False),
    Column("data", JSON),
    UniqueConstraint("job_id", "n"),
)

files = Table(
    "files",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("owner", String(128), nullable=False),
    Column("filename", Text, nullable=False, doc="as the client called it; never a path here"),
    Column("purpose", String(32), nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("sha256", String(64), nullable=False),
    Column("created", Float, nullable=False),
    Column("expires", Float),
    Column("status", String(16), nullable=False, doc="uploaded, processed or error"),
    Column("status_details", Text),
    Column("summary", JSON, doc="rows, tokens and what else was found when it was checked"),
    Index(None, "owner", "created"),
)

uploads = Table(
    "uploads",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("owner", String(128), nullable=False),
    Column("filename", Text, nullable=False),
    Column("purpose", String(32), nullable=False),
    Column("mime_type", String(128), nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("created", Float, nullable=False),
    Column("expires", Float, nullable=False),
    Column("status", String(16), nullable=False, doc="pending, completed, cancelled or expired"),
    Column("file_id", String(64)),
    Column("file_expires_s", Integer),
)

upload_parts = Table(
    "upload_parts",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("upload_id", String(64), ForeignKey("uploads.id", ondelete="CASCADE"), nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("created", Float, nullable=False),
)

models = Table(
    "models",
    metadata,
    Column("name", String(255), primary_key=True, doc="as clients ask for it, such as ft:base:owner:suffix:id"),
    Column("owner", String(128), nullable=False),
    Column("adapter", String(128), nullable=False, doc="content id in the library"),
    Column("library_name", String(255), nullable=False, doc="name@version in the library"),
    Column("base", String(255), nullable=False),
    Column("job_id", String(64)),
    Column("step", Integer, doc="of a checkpoint"),
    Column("created", Float, nullable=False),
    Index(None, "adapter"),
    Index(None, "owner", "created"),
)

webhooks = Table(
    "webhooks",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("owner", String(128), nullable=False),
    Column("name", Text),
    Column("url", Text, nullable=False),
    Column("secret", Text, nullable=False, doc="signs deliveries, so it cannot be kept as a hash"),
    Column("old_secret", Text),
    Column("old_secret_until", Float),
    Column("event_types", JSON, nullable=False),
    Column("enabled", Boolean, nullable=False, default=True),
    Column("created", Float, nullable=False),
)

deliveries = Table(
    "deliveries",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("webhook_id", String(64), ForeignKey("webhooks.id", ondelete="CASCADE"), nullable=False),
    Column("event", JSON, nullable=False),
    Column("attempts", Integer, nullable=False, default=0),
    Column("next_at", Float),
    Column("delivered", Float),
    Column("error", Text),
    Index(None, "next_at"),
)

sessions = Table(
    "sessions",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("owner", String(128), nullable=False),
    Column("created", Float, nullable=False),
    Column("heartbeat", Float, nullable=False),
    Column("ended", Float),
    Column("tags", JSON, nullable=False),
    Column("user_metadata", JSON),
    Column("sdk_version", String(64)),
)

training_runs = Table(
    "training_runs",
    metadata,
    Column("id", String(128), primary_key=True, doc="<session id>:train:<model_seq_id>"),
    Column("session_id", String(64), ForeignKey("sessions.id"), nullable=False),
    Column("owner", String(128), nullable=False),
    Column("base", String(255), nullable=False),
    Column("spec", JSON, nullable=False, doc="rank, targets, seed, optimizer"),
    Column("user_metadata", JSON),
    Column("created", Float, nullable=False),
    Column("last_request", Float, nullable=False),
    Column("applied_seq", Integer, nullable=False, default=0, doc="the last request whose effect is saved"),
    Column("state", String(16), nullable=False, doc="live, saved, lost or ended"),
    Column("state_folder", Text, doc="where the weights, optimizer and latest results are saved for a restart"),
    Index(None, "owner", "created"),
)

checkpoints = Table(
    "checkpoints",
    metadata,
    Column("id", String(255), primary_key=True, doc="<run id>/weights/<name> or <run id>/sampler_weights/<name>"),
    Column("run_id", String(128), ForeignKey("training_runs.id"), nullable=False),
    Column("owner", String(128), nullable=False),
    Column("kind", String(16), nullable=False, doc="training, sampler or external"),
    Column("folder", Text, nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("created", Float, nullable=False),
    Column("expires", Float),
    Column("published", Boolean, nullable=False, default=False),
    Column("user_metadata", JSON),
    Column("library_name", String(255)),
    Index(None, "owner", "created"),
)

sampling_sessions = Table(
    "sampling_sessions",
    metadata,
    Column("id", String(128), primary_key=True),
    Column("session_id", String(64), ForeignKey("sessions.id"), nullable=False),
    Column("owner", String(128), nullable=False),
    Column("base", String(255), nullable=False),
    Column("model_path", Text),
    Column("created", Float, nullable=False),
)

request_keys = Table(
    "request_keys",
    metadata,
    Column("id", String(64), primary_key=True, doc="SHA-256 of the account and the key"),
    Column("request", String(64), nullable=False, doc="SHA-256 of what was asked for"),
    Column("created", Float, nullable=False),
    Index(None, "created"),
)
