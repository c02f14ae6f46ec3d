"""The second version: keys by which a client marks a request that it may send again."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Make the table."""
    op.create_table(
        "request_keys",
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("request", sa.String(length=64), nullable=False),
        sa.Column("created", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_request_keys")),
    )
    op.create_index(op.f("ix_request_keys_created"), "request_keys", ["created"], unique=False)


def downgrade() -> None:
    """Drop it."""
    op.drop_index(op.f("ix_request_keys_created"), table_name="request_keys")
    op.drop_table("request_keys")
