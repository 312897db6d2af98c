"""The cluster manager over real gRPC, with storage nodes that follow the rules of targets."""

from __future__ import annotations

import asyncio
import os
import time

import pytest

from fs3.core.errors import Fs3Error
from fs3.kv.memory import MemoryKv
from fs3.mgmtd import chains
from fs3.mgmtd.lease import RELEASE
from fs3.mgmtd.state import LEASE_KEY
from fs3.rpc.grpc_client import fetch_routing
from fs3.rpc.mgmtd_client import MgmtdClient, NodeSession
from fs3.v1.disk_mgmtd_pb2 import ManagerLease
from fs3.v1.frame_pb2 import Code
from fs3.v1.mgmtd_pb2 import ChangeSettingsRequest, ChangeTagsRequest, HeartbeatRequest
from fs3.v1.routing_pb2 import Disk, GetRoutingResponse, Node, NodeStatus, Routing, RoutingKnown
from mgmtd.harness import (
    CLUSTER,
    HEARTBEAT_MS,
    LEASE_MS,
    TOKEN,
    FakeNode,
    RunningManager,
    all_serving,
    cluster,
    run,
    states,
    until,
)


def by_node(routing: Routing, node_id: int) -> set[int]:
    """The states of a node's targets."""
    return {t.state for c in routing.chains for t in c.targets if t.target_id // 1000 == node_id}


def test_chains_are_made_once_enough_nodes_are_there() -> None:
    async def body() -> None:
        async with cluster(3) as (manager, nodes, _):
            routing = manager.routing
            assert len(routing.chains) == 2
            assert all(c.version == 1 for c in routing.chains)
            assert all({t.target_id // 1000 for t in c.targets} == {1, 2, 3} for c in routing.chains)
            (table,) = routing.tables
            assert (table.table_id, table.table_version, table.replicas) == (1, 1, 3)
            assert list(table.chain_ids) == [1, 2]
            assert {t.target_id for t in routing.targets} == {1000, 1001, 2000, 2001, 3000, 3001}
            assert routing.lease_ms == LEASE_MS
            assert [n.node_id for n in nodes] == [1, 2, 3]

    run(body)


def test_later_nodes_get_chains_in_a_new_table_version_and_old_ones_stay() -> None:
    async def body() -> None:
        async with cluster(2, replicas=1) as (manager, _nodes, _):
            before = manager.routing
            assert len(before.chains) == 4
            late = FakeNode(manager.address, name="late")
            await late.start()
            await until(lambda: len(manager.routing.tables) == 2, "a second table version")
            assert manager.routing.tables[0] == before.tables[0]
            assert list(manager.routing.tables[1].chain_ids) == [1, 2, 3, 4, 5, 6]
            await late.kill()

    run(body)


def test_a_silent_node_fails_after_its_lease_and_comes_back_through_syncing() -> None:
    async def body() -> None:
        async with cluster(3) as (manager, nodes, _):
            await nodes[0].kill()
            await until(lambda: by_node(manager.routing, 1) == {chains.OFFLINE}, "node 1 out of service")
            assert by_node(manager.routing, 2) == {chains.SERVING}
            assert manager.routing.nodes[0].status == NodeStatus.NODE_STATUS_FAILED
            nodes[0].syncs = False
            await nodes[0].start()
            await until(lambda: by_node(manager.routing, 1) == {chains.SYNCING}, "node 1 syncs")
            nodes[0].syncs = True
            await until(lambda: all_serving(manager.routing), "all serve")
            assert all(c.targets[-1].target_id // 1000 == 1 for c in manager.routing.chains)

    run(body)


def test_a_node_that_restarts_within_its_lease_leaves_service_before_it_comes_back() -> None:
    async def body() -> None:
        async with cluster(3, lease_ms=60_000) as (manager, nodes, _):
            await nodes[1].kill()
            nodes[1].syncs = False
            await nodes[1].start()
            await until(lambda: by_node(manager.routing, 2) == {chains.SYNCING}, "node 2 syncs")
            nodes[1].syncs = True
            await until(lambda: all_serving(manager.routing), "all serve")

    run(body)


def test_stopping_in_good_order_needs_no_lease_to_run_out() -> None:
    async def body() -> None:
        async with cluster(3, lease_ms=60_000) as (manager, nodes, _):
            await nodes[2].stop()
            assert by_node(manager.routing, 3) == {chains.OFFLINE}
            assert by_node(manager.routing, 1) == {chains.SERVING}

    run(body)


def test_all_nodes_stop_one_after_another_and_the_whole_cluster_comes_back() -> None:
    async def body() -> None:
        async with cluster(3, lease_ms=60_000) as (manager, nodes, store):
            for node in nodes:
                await node.stop()
            assert [[t.state for t in c.targets] for c in manager.routing.chains] == [
                [chains.LASTSRV, chains.OFFLINE, chains.OFFLINE]
            ] * 2
            assert all(c.targets[0].target_id // 1000 == 3 for c in manager.routing.chains)
            await manager.stop()
            again = await RunningManager.start(store, min_storage_nodes=3, lease_ms=60_000)
            try:
                for node in nodes:
                    node.addresses = [again.address]
                # Those that stopped first are behind: nobody serves before the last one is back.
                await nodes[0].start()
                await nodes[1].start()
                for _ in range(20):
                    await asyncio.sleep(HEARTBEAT_MS / 4000)
                    assert not any(t.state == chains.SERVING for c in again.routing.chains for t in c.targets)
                await nodes[2].start()
                await until(lambda: all_serving(again.routing), "all serve")
                assert all(c.targets[0].target_id // 1000 == 3 for c in again.routing.chains)
            finally:
                for node in nodes:
                    await node.kill()
                await again.stop()

    run(body)


def test_all_nodes_killed_at_once_and_restarted_serve_again_whoever_returns() -> None:
    async def body() -> None:
        async with cluster(3) as (manager, nodes, _):
            for node in nodes:
                await node.kill()
            await until(
                lambda: {t.state for c in manager.routing.chains for t in c.targets} == {chains.LASTSRV},
                "all are last serving",
            )
            # One disk is lost for good: any of the set has every acknowledged write.
            await nodes[0].start()
            await until(lambda: by_node(manager.routing, 1) == {chains.SERVING}, "node 1 serves alone")
            await nodes[1].start()
            await nodes[2].start()
            await until(lambda: all_serving(manager.routing), "all serve")

    run(body)


def test_a_broken_disk_takes_its_targets_out_while_the_node_lives() -> None:
    async def body() -> None:
        async with cluster(3, lease_ms=60_000) as (manager, nodes, _):
            nodes[0].broken.add(1000)
            await until(
                lambda: any(
                    t.target_id == 1000 and t.state == chains.OFFLINE for c in manager.routing.chains for t in c.targets
                ),
                "target 1000 is out",
            )
            assert manager.routing.nodes[0].status == NodeStatus.NODE_STATUS_CONNECTED
            assert chains.SERVING in by_node(manager.routing, 1)

    run(body)


def test_a_restart_of_the_manager_changes_no_chain() -> None:
    async def body() -> None:
        async with cluster(3) as (manager, nodes, store):
            before = states(manager.routing)
            version = manager.routing.version
            port = manager.service.port
            await manager.stop()
            again = await RunningManager.start(store, min_storage_nodes=3, grpc_port=port)
            try:
                assert states(again.routing) == before
                await until(
                    lambda: all(n.session is not None and n.session._sequence > 0 for n in nodes), "nodes are heard"
                )
                live = again.service.manager
                assert live is not None
                await until(lambda: all(v.sequence for v in live.live.values()), "every node was heard")
                started = asyncio.get_running_loop().time()
                await until(lambda: asyncio.get_running_loop().time() - started > 1.5 * LEASE_MS / 1000)
                assert states(again.routing) == before
                assert again.routing.version >= version
            finally:
                for node in nodes:
                    await node.kill()
                await again.stop()

    run(body)


def test_a_manager_that_stood_still_declares_nobody_failed_for_it() -> None:
    async def body() -> None:
        async with cluster(3) as (manager, _nodes, _):
            before = states(manager.routing)
            # The event loop of the manager (and of the nodes) does nothing for longer than the lease.
            time.sleep(2 * LEASE_MS / 1000)  # noqa: ASYNC251
            seen = {n.session._sequence for n in _nodes if n.session}
            await until(lambda: all(n.session and n.session._sequence > max(seen) + 3 for n in _nodes), "heard again")
            assert states(manager.routing) == before

    run(body)


def test_a_standby_takes_over_when_the_primary_is_silent_and_nodes_follow() -> None:
    async def body() -> None:
        store = MemoryKv()
        first = await RunningManager.start(store, min_storage_nodes=1, replicas=1)
        second = await RunningManager.start(store, min_storage_nodes=1, replicas=1)
        node = FakeNode([second.address, first.address], name="n0")
        try:
            await node.start()
            await until(lambda: all_serving(first.routing), "serving under the first")
            assert node.session is not None
            assert node.session.client.primary == first.address
            # The first one vanishes without giving the lease back.
            first.service.manager = None
            first.task.cancel()
            await asyncio.gather(first.task, return_exceptions=True)
            await until(lambda: second.service.manager is not None, "the second is primary")
            assert second.service.manager is not None
            await until(lambda: bool(second.service.manager.live[1].sequence), "the node found it")
            assert all_serving(second.routing)
        finally:
            await node.kill()
            await first.stop()
            await second.stop()
            await store.close()

    run(body)


def test_a_standby_of_an_older_release_never_becomes_primary() -> None:
    async def body() -> None:
        store = MemoryKv()
        first = await RunningManager.start(store)
        older = await RunningManager.start(store, release=RELEASE - 1)
        managers = [first, older]
        try:
            await first.stop()
            await until(lambda: older.service.seen_lease().released, "the lease was given back")
            managers.append(await RunningManager.start(store, release=RELEASE + 1))
            await until(lambda: managers[-1].service.manager is not None, "a newer one is primary")
            assert older.service.manager is None
        finally:
            for manager in managers:
                await manager.stop()
            await store.close()

    run(body)


def test_renewing_the_lease_leaves_the_records_before_it_as_they_were() -> None:
    """A record that is written again and again would keep the memory of everything that was ever written to it."""

    async def body() -> None:
        store = MemoryKv()
        manager = await RunningManager.start(store)
        try:
            first = manager.service.seen_lease()
            beat = first.beat
            await until(lambda: manager.service.seen_lease().beat > beat, "the lease was renewed")
            assert first.beat == beat
        finally:
            await manager.stop()
            await store.close()

    run(body)


def test_a_primary_that_lost_its_lease_writes_and_answers_nothing_more() -> None:
    async def body() -> None:
        async with cluster(1, replicas=1) as (manager, _nodes, store):
            tx = store.transaction()
            record = ManagerLease.FromString(await tx.get(LEASE_KEY) or b"")
            record.epoch += 1
            record.holder = os.urandom(16)
            record.address = "127.0.0.1:1"
            tx.set(LEASE_KEY, record.SerializeToString())
            await tx.commit()
            before = manager.routing
            client = MgmtdClient([manager.address], TOKEN, CLUSTER)
            code = int(Code.CODE_TIMEOUT)
            # So short that only one manager is asked; on a busy machine that may take several tries.
            while code == Code.CODE_TIMEOUT:
                with pytest.raises(Fs3Error) as refused:
                    await client.register(
                        Node(uuid=os.urandom(16), incarnation=os.urandom(16), role="meta"), timeout_s=0.01
                    )
                code = refused.value.code
            assert code == Code.CODE_NOT_PRIMARY
            assert before.nodes[-1].role == "storage"
            await until(lambda: manager.service.manager is None or manager.service.manager.lost.is_set(), "it noticed")
            await client.close()

    run(body)


@pytest.mark.parametrize(
    ("token", "cluster_id", "code"),
    [("wrong", CLUSTER, Code.CODE_UNAUTHENTICATED), ("", CLUSTER, Code.CODE_UNAUTHENTICATED), (TOKEN, "other", 31)],
)
def test_strangers_are_refused(token: str, cluster_id: str, code: int) -> None:
    async def body() -> None:
        store = MemoryKv()
        manager = await RunningManager.start(store)
        with pytest.raises(Fs3Error) as refused:
            await asyncio.to_thread(fetch_routing, manager.address, token=token, cluster_id=cluster_id)
        assert refused.value.code == code
        await manager.stop()
        await store.close()

    run(body)


def test_routing_can_be_fetched_from_a_thread() -> None:
    async def body() -> None:
        async with cluster(1, replicas=1) as (manager, _, _store):
            routing = await asyncio.to_thread(fetch_routing, manager.address, token=TOKEN, cluster_id=CLUSTER)
            assert routing == manager.routing

    run(body)


def test_heartbeats_of_an_older_life_are_refused() -> None:
    async def body() -> None:
        store = MemoryKv()
        manager = await RunningManager.start(store)
        client = MgmtdClient([manager.address], TOKEN, CLUSTER)
        old, new = os.urandom(16), os.urandom(16)
        uuid = os.urandom(16)
        first = await client.register(Node(uuid=uuid, incarnation=old, role="storage"))
        second = await client.register(Node(uuid=uuid, incarnation=new, role="storage"))
        assert first.node_id == second.node_id
        with pytest.raises(Fs3Error) as refused:
            await client.heartbeat(HeartbeatRequest(node_id=first.node_id, incarnation=old, sequence=1), timeout_s=2)
        assert refused.value.code == Code.CODE_STALE_HANDLE
        beat = HeartbeatRequest(node_id=first.node_id, incarnation=new, sequence=5)
        assert (await client.heartbeat(beat, timeout_s=2)).routing.version == manager.routing.version
        beat.sequence = 4
        with pytest.raises(Fs3Error) as overtaken:
            await client.heartbeat(beat, timeout_s=2)
        assert overtaken.value.code == Code.CODE_SUPERSEDED
        await client.close()
        await manager.stop()
        await store.close()

    run(body)


def test_a_disk_of_another_node_is_refused() -> None:
    async def body() -> None:
        async with cluster(1, replicas=1) as (manager, nodes, _):
            client = MgmtdClient([manager.address], TOKEN, CLUSTER)
            node = Node(uuid=os.urandom(16), incarnation=os.urandom(16), role="storage")
            with pytest.raises(Fs3Error) as refused:
                await client.register(node, [Disk(uuid=nodes[0].disks[0].uuid, path="/stolen")])
            assert refused.value.code == Code.CODE_EXISTS
            await client.close()

    run(body)


def test_watchers_see_every_node_and_a_meta_node_leaves_the_routing_when_it_stops() -> None:
    async def body() -> None:
        async with cluster(1, replicas=1) as (manager, nodes, _):
            client = MgmtdClient([manager.address], TOKEN, CLUSTER)
            meta = NodeSession(client, Node(uuid=os.urandom(16), incarnation=os.urandom(16), role="meta", host="h"))
            await meta.register()
            watcher = nodes[0].session
            assert watcher is not None
            await until(lambda: any(n.role == "meta" for n in watcher.routing.nodes), "the meta node is seen")
            await meta.unregister()
            await until(lambda: not any(n.role == "meta" for n in watcher.routing.nodes), "the meta node is gone")
            await client.close()

    run(body)


def follow(manager: RunningManager, nodes: list[FakeNode]) -> bool:
    """Whether every node has the manager's routing, the same in everything."""
    return all(node.session is not None and node.session.routing == manager.routing for node in nodes)


def test_who_follows_is_told_what_changed_and_has_the_managers_routing() -> None:
    async def body() -> None:
        async with cluster(4, replicas=2) as (manager, nodes, _):
            await until(lambda: follow(manager, nodes), "the nodes follow")
            assert manager.service.manager is not None
            sent = manager.service.manager.teller.sent
            wholes, deltas, version = sent.wholes, sent.deltas, manager.routing.version
            await nodes[0].kill()
            await until(lambda: by_node(manager.routing, 1) == {chains.OFFLINE}, "node 1 out of service")
            await until(lambda: follow(manager, nodes[1:]), "the others follow")
            assert manager.routing.version > version
            assert sent.deltas >= deltas + 3
            assert sent.wholes == wholes

    run(body)


def test_a_new_primary_tells_the_whole_before_it_tells_changes() -> None:
    async def body() -> None:
        store = MemoryKv()
        first = await RunningManager.start(store, min_storage_nodes=3)
        second = await RunningManager.start(store, min_storage_nodes=3)
        nodes = [FakeNode([first.address, second.address], name=f"n{i}") for i in range(3)]
        for node in nodes:
            await node.start()
        await until(lambda: all_serving(first.routing) and follow(first, nodes), "all serve")
        history = first.routing.history
        await first.stop()
        await until(lambda: second.service.manager is not None, "the standby is primary")
        await until(lambda: follow(second, nodes), "the nodes follow")
        assert second.service.manager is not None
        assert second.routing.history not in (0, history)
        assert second.service.manager.teller.sent.wholes >= 3
        for node in nodes:
            await node.kill()
        await second.stop()
        await store.close()

    run(body)


def test_a_delta_that_does_not_fit_is_refused_and_the_whole_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    async def body() -> None:
        async with cluster(3) as (manager, nodes, _):
            await until(lambda: follow(manager, nodes), "the nodes follow")
            assert manager.service.manager is not None
            teller, spoilt = manager.service.manager.teller, 0
            tell = teller.tell

            def spoil(asker: RoutingKnown) -> GetRoutingResponse:
                nonlocal spoilt
                answer = GetRoutingResponse()
                answer.CopyFrom(tell(asker))
                if answer.HasField("delta"):
                    spoilt += 1
                    del answer.delta.changed.chains[:]
                    answer.delta.counts.chain_versions += 1
                return answer

            monkeypatch.setattr(teller, "tell", spoil)
            await nodes[0].kill()
            await until(lambda: by_node(manager.routing, 1) == {chains.OFFLINE}, "node 1 out of service")
            await until(lambda: follow(manager, nodes[1:]), "the others follow")
            assert spoilt > 0
            assert by_node(manager.routing, 2) == {chains.SERVING}

    run(body)


def test_state_of_another_cluster_is_refused() -> None:
    async def body() -> None:
        store = MemoryKv()
        manager = await RunningManager.start(store, replicas=1)
        client = MgmtdClient([manager.address], TOKEN, CLUSTER)
        await client.register(Node(uuid=os.urandom(16), incarnation=os.urandom(16), role="meta"))
        await client.close()
        await manager.stop()
        with pytest.raises(Fs3Error) as refused:
            await RunningManager.start(store, cluster_id="another")
        assert refused.value.code == Code.CODE_WRONG_CLUSTER
        await store.close()

    run(body)


def test_settings_reach_every_node_with_the_routing_and_outlive_the_manager() -> None:
    async def body() -> None:
        async with cluster(1, replicas=1) as (manager, nodes, store):
            client = MgmtdClient([manager.address], TOKEN, CLUSTER)
            try:
                changed = await client.call(
                    "ChangeSettings", ChangeSettingsRequest(values={"meta.stripe": "4", "log_level": "debug"}), 5
                )
                assert changed.version == 1
                session = nodes[0].session
                assert session is not None
                wanted = {"meta.stripe": "4", "log_level": "debug"}
                await until(lambda: dict(session.routing.settings.values) == wanted, "the settings")
                for bad in (
                    ChangeSettingsRequest(values={"meta.stripe": "5", "nothing": "1"}),
                    ChangeSettingsRequest(values={"meta.stripe": "x"}),
                    ChangeSettingsRequest(unset=["nothing"]),
                ):
                    with pytest.raises(Fs3Error) as caught:
                        await client.call("ChangeSettings", bad, 5)
                    assert caught.value.code == Code.CODE_INVALID_ARGUMENT
                changed = await client.call("ChangeSettings", ChangeSettingsRequest(unset=["log_level"]), 5)
                assert (changed.version, dict(changed.values)) == (2, {"meta.stripe": "4"})
                assert (await client.call("ChangeSettings", ChangeSettingsRequest(), 5)).version == 2
            finally:
                await client.close()
            await manager.stop()
            after = await RunningManager.start(store, replicas=1)
            try:
                settings = after.routing.settings
                assert (settings.version, dict(settings.values)) == (2, {"meta.stripe": "4"})
            finally:
                await after.stop()

    run(body)


def test_nodes_get_chains_once_they_are_tagged_and_keep_their_tags() -> None:
    async def body() -> None:
        store = MemoryKv()
        manager = await RunningManager.start(store, replicas=2, failure_domain="rack")
        nodes = [FakeNode(manager.address, name=f"n{i}") for i in range(3)]
        client = MgmtdClient([manager.address], TOKEN, CLUSTER)
        racks = {1: "a", 2: "a", 3: "b"}
        try:
            for node in nodes:
                await node.start()
            for node_id in (1, 2):
                await tag(client, node_id, rack=racks[node_id])
            assert not manager.routing.chains
            assert await tag(client, 3, rack="b", x="y") == {"rack": "b", "x": "y"}
            await until(lambda: all_serving(manager.routing), "chains")
            for chain in manager.routing.chains:
                assert {racks[t.target_id // 1000] for t in chain.targets} == {"a", "b"}
            await nodes[2].kill()
            await nodes[2].start()
            assert dict(manager.routing.nodes[2].tags) == {"rack": "b", "x": "y"}
            await client.call("ChangeTags", ChangeTagsRequest(node_id=3, unset=["x"]), 5.0)
            assert dict(manager.routing.nodes[2].tags) == {"rack": "b"}
            for request in (ChangeTagsRequest(node_id=9), ChangeTagsRequest(node_id=1, values={"": "v"})):
                with pytest.raises(Fs3Error) as refused:
                    await client.call("ChangeTags", request, 5.0)
                assert refused.value.code in (Code.CODE_NOT_FOUND, Code.CODE_INVALID_ARGUMENT)
        finally:
            await client.close()
            for node in nodes:
                await node.kill()
            await manager.stop()
            await store.close()

    run(body)


async def tag(client: MgmtdClient, node_id: int, **values: str) -> dict[str, str]:
    """Set tags; returns all that the node has."""
    node: Node = await client.call("ChangeTags", ChangeTagsRequest(node_id=node_id, values=values), 5.0)
    return dict(node.tags)


def test_a_registration_of_an_earlier_start_that_arrives_late_takes_nothing_out_of_service() -> None:
    async def body() -> None:
        async with cluster(1, replicas=1) as (manager, nodes, _store):
            client = MgmtdClient([manager.address], TOKEN, CLUSTER)
            try:

                def node(life: int) -> Node:
                    uuid = nodes[0].uuid
                    return Node(uuid=uuid, incarnation=os.urandom(16), role="storage", host="h", life=life)

                await nodes[0].kill()
                now = await client.register(node(7), timeout_s=5)
                before = manager.routing.nodes[0].incarnation
                for life in (6, 0):
                    with pytest.raises(Fs3Error) as refused:
                        await client.register(node(life), timeout_s=5)
                    assert refused.value.code == Code.CODE_STALE_HANDLE
                assert manager.routing.nodes[0].incarnation == before
                assert (await client.register(node(8), timeout_s=5)).node_id == now.node_id
                assert manager.routing.nodes[0].incarnation != before
            finally:
                await client.close()

    run(body)
