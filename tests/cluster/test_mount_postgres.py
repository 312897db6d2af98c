"""PostgreSQL with its data on a mount: `make torture-apps` is the long run."""

from __future__ import annotations

import pytest

from tests.cluster.postgres import reason_not_to_run, whole_trial


def test_postgres_loses_no_transaction_when_it_or_a_storage_service_is_killed() -> None:
    if reason := reason_not_to_run():
        pytest.skip(reason)
    outcome = whole_trial(seconds=4, kills=1)
    assert outcome.acknowledged > 0
