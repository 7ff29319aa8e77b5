"""The scaling model against numbers worked out by hand, and against what must hold whatever the constants are."""

from __future__ import annotations

from dataclasses import replace

import pytest

from configs.errors import UserError
from launch.scale import Device, Efficiency, Hardware, ModelShape, Network, PlanFacts, named, overlapped, scale
from launch.scale.collectives import all_reduce, gather_or_scatter
from launch.scale.passes import ADAM_BYTES, forward_flops, forward_pass, micro_batches, sampling, training_step
from launch.scale.step import step_costs, wall

GB = 1e9
PERFECT = Efficiency(gemm=1.0, memory=1.0, links=1.0, overlap=0.0, activation_traffic=0.0, launch=0.0)


def cluster(link: float = 100 * GB, node: float = 50 * GB, latency: tuple[float, float] = (0.0, 0.0), node_size: int = 8, **device: float) -> Hardware:
    return Hardware(Device("test", device.get("flops", 1e12), device.get("bandwidth", 1e30), 80e9), Network(node_size, link, latency[0], node, latency[1]), PERFECT)


# collectives


def test_ring_all_reduce_of_one_gigabyte_over_eight():
    # 2 × 7/8 × 1 GB / 100 GB/s = 17.5 ms; each half of it is one reduce-scatter or all-gather
    assert all_reduce(GB, 8, cluster()) == pytest.approx(17.5e-3)
    assert gather_or_scatter(GB, 8, cluster()) == pytest.approx(8.75e-3)
    assert all_reduce(GB, 1, cluster()) == gather_or_scatter(GB, 1, cluster()) == 0.0


def test_across_nodes_the_slower_of_link_and_adapters_counts():
    # two nodes of 8: a device sends 15/16 GB at 100 GB/s (9.375 ms); a node takes in 8/16 GB at 50 GB/s (10 ms)
    assert gather_or_scatter(GB, 16, cluster()) == pytest.approx(10e-3)
    # with adapters of 80 GB/s that is 6.25 ms, and the links bound it
    assert gather_or_scatter(GB, 16, cluster(node=80 * GB)) == pytest.approx(9.375e-3)


def test_latency_counts_hops_and_messages():
    # 7 hops of 3 µs, ten messages; on two nodes 15 hops, of which 2 leave a node: 13 × 3 + 2 × 10 = 59 µs
    assert gather_or_scatter(0.0, 8, cluster(latency=(3e-6, 10e-6)), messages=10) == pytest.approx(210e-6)
    assert gather_or_scatter(0.0, 16, cluster(latency=(3e-6, 10e-6))) == pytest.approx(59e-6)


def test_one_device_per_node_has_only_the_network():
    # 3/4 GB at 50 GB/s = 15 ms, and 3 hops of 10 µs
    assert gather_or_scatter(GB, 4, cluster(node_size=1, latency=(3e-6, 10e-6))) == pytest.approx(15e-3 + 30e-6)


def test_a_tree_is_taken_where_latency_rules():
    # 64 nodes of 8, one small message: a ring needs 2 × (447 × 3 µs + 64 × 10 µs) = 3962 µs, a tree 2 × log2(64) × 10 µs = 120 µs
    hardware = cluster(latency=(3e-6, 10e-6))
    assert all_reduce(0.0, 512, hardware) == pytest.approx(120e-6)
    # at 10 GB the ring wins: 2 × (504/512) × 10 GB / 50 GB/s = 393.75 ms and its latency; the tree moves 2 × 10 GB / 50 GB/s = 400 ms
    assert all_reduce(10 * GB, 512, hardware) == pytest.approx(393.75e-3 + 3962e-6)


# passes

SMALL = ModelShape(parameters=1_000_000, trained=1_000_000, layers=2, hidden=0, kv_width=100)


def facts(**changes) -> PlanFacts:
    values = dict(stage="sft", policy=SMALL, rows=8, steps=10, tokens=125, micro_batch=8)
    return PlanFacts(**(values | changes))


def test_flops_of_a_token():
    # 2 × 10⁹ parameters' worth, less 0.1 × 10⁹ that are only looked up, and 4 × 10 × 1000 × 100 for attention
    shape = ModelShape(1_000_000_000, 0, 10, 1000, 2000, lookup=100_000_000)
    assert forward_flops(shape, 100) == pytest.approx(1.8e9 + 4e6)


@pytest.mark.parametrize(("changes", "per_parameter"), [({}, 6), ({"checkpointing": True}, 8), ({"policy": replace(SMALL, trained=0)}, 4)])
def test_training_takes_six_flops_a_parameter_eight_with_recomputation_four_without_weight_gradients(changes, per_parameter):
    # 1000 tokens × 6 × 10⁶ FLOPs at 10¹² FLOP/s = 6 ms
    plan = facts(**changes)
    assert training_step(plan.policy, 8, 125, plan, 1, cluster()).compute == pytest.approx(per_parameter * 1e-3)


def test_adam_moves_thirty_bytes_a_parameter_and_zero_splits_them():
    hardware = cluster(bandwidth=1e9, flops=1e30)
    alone = training_step(SMALL, 8, 125, facts(weight_bytes=0), 1, hardware).memory  # weight_bytes 0 leaves out all other traffic
    assert alone == pytest.approx(ADAM_BYTES * 1e6 / 1e9)
    assert training_step(SMALL, 8, 125, facts(weight_bytes=0, zero=1), 4, hardware).memory == pytest.approx(alone / 4)
    assert training_step(SMALL, 8, 125, facts(weight_bytes=0, zero=0), 4, hardware).memory == pytest.approx(alone)


@pytest.mark.parametrize(("zero", "sent"), [(0, 2 * 2), (1, 2 + 2), (2, 2 * 2 + 2), (3, 2 * (2 * 2 + 2))])
def test_bytes_that_a_step_of_two_micro_batches_sends(zero, sent):
    # In units of parameters × 7/8 / 100 GB/s, weights and gradients of 2 bytes: DDP all-reduces once (2 × 2), ZeRO-1 scatters and gathers once,
    # ZeRO-2 scatters in both micro-batches and gathers once, ZeRO-3 gathers twice and scatters once in both.
    plan = facts(zero=zero, micro_batch=4)
    assert training_step(SMALL, 8, 125, plan, 8, cluster()).network == pytest.approx(sent * 1e6 * 7 / 8 / (100 * GB))


def test_communication_hides_under_a_share_of_the_pass():
    slow = cluster(link=1e6)  # 10⁶ parameters × 2 bytes × 7/8 at 1 MB/s: 1.75 s each; a pass takes 6 ms
    plan = facts(zero=3)
    cost = training_step(SMALL, 8, 125, plan, 8, slow)
    assert cost.exposed == pytest.approx(3 * 1.75)
    assert cost.bound == "network"
    half = slow.with_efficiency(overlap=0.5)
    assert training_step(SMALL, 8, 125, plan, 8, half).exposed == pytest.approx(3 * 1.75 - 0.5 * 6e-3)
    assert training_step(SMALL, 8, 125, plan, 8, cluster(link=1e12).with_efficiency(overlap=1.0)).exposed == 0.0


def test_frozen_models_are_gathered_once_per_micro_batch():
    plan = facts(zero=3, micro_batch=2)
    cost = forward_pass(SMALL, 7, 125, plan, 8, cluster())  # micro-batches of 2, 2, 2 and 1
    assert cost.network == pytest.approx(4 * 2e6 * 7 / 8 / (100 * GB))
    assert cost.compute == pytest.approx(7 * 125 * 2e6 / 1e12)
    assert micro_batches(7, 2) == [(2, 3), (1, 1)]
    assert micro_batches(4, 2) == [(2, 2)]


def test_a_token_of_a_rollout_reads_weights_and_cache():
    # weights 2 MB; cache: 4 rows × (10 + 20/2) tokens × 100 numbers × 2 layers × 2 bytes = 32 kB; at 1 GB/s 2.032 ms a token, 20 tokens
    plan = facts(stage="ppo", tokens=10, new_tokens=20, generate_batch=4)
    cost = sampling(plan, 4, 1, cluster(bandwidth=1e9, flops=1e30))
    prompt = 2e6 / 1e9  # the prompt's pass reads the weights once
    assert cost.memory == pytest.approx(20 * 2.032e-3 + prompt)
    assert cost.bound == "memory"
    # two rounds where only two fit
    twice = sampling(replace(plan, generate_batch=2), 4, 1, cluster(bandwidth=1e9, flops=1e30))
    assert twice.memory == pytest.approx(2 * (20 * 2.016e-3 + prompt))


def test_a_rollout_under_zero_3_gathers_once_or_for_every_token():
    plan = facts(stage="ppo", tokens=10, new_tokens=20, generate_batch=4, zero=3)
    gather = 2e6 * 7 / 8 / (100 * GB)
    assert sampling(plan, 4, 8, cluster()).network == pytest.approx(gather)
    assert sampling(replace(plan, gather_once=False), 4, 8, cluster()).network == pytest.approx(20 * gather)


def test_tensor_parallel_sampling_reads_a_part_of_the_weights_and_joins_twice_a_layer():
    shape = replace(SMALL, hidden=50)
    plan = facts(stage="ppo", policy=shape, tokens=10, new_tokens=20, generate_batch=4, tensor_parallel=2)
    cost = sampling(plan, 4, 8, cluster(bandwidth=1e9, flops=1e30))
    assert cost.memory == pytest.approx(20 * 1.032e-3 + 2e-3)
    # 20 tokens × 2 layers × 2 all-reduces (2 × 1/2 of 2 × 4 rows × 50 numbers × 2 bytes = 800 bytes)
    assert cost.network == pytest.approx(20 * 4 * 800 / (100 * GB))


# steps and rows


def test_ppo_is_rollout_scoring_and_update():
    plan = facts(stage="ppo", rows=8, tokens=10, new_tokens=20, reference=SMALL, value=SMALL, rewards=(SMALL,), epochs=2, minibatches=4, micro_batch=1)
    costs = step_costs(plan, 1, cluster())
    token = 2e6 / 1e12
    assert costs["scoring"].compute == pytest.approx(4 * 8 * 30 * token)  # policy, reference, value and reward model read every token
    assert costs["update"].compute == pytest.approx(2 * 2 * 8 * 30 * 3 * token)  # two models, two epochs over all rows
    assert wall(plan, costs, cluster()) == pytest.approx(sum(cost.seconds for cost in costs.values()))


def test_devices_that_only_sample_work_beside_the_others():
    plan = facts(stage="ppo", rows=32, tokens=10, new_tokens=20, rollout_share=0.5)
    costs = step_costs(plan, 8, cluster())
    assert costs["scoring"].compute == pytest.approx(32 / 4 * 30 * 2e6 / 1e12)  # four devices train
    sent = gather_or_scatter(2e6, 16, cluster())
    assert wall(plan, costs, cluster()) == pytest.approx(max(costs["rollout"].seconds, costs["scoring"].seconds + costs["update"].seconds) + sent)


def test_the_best_share_of_devices_that_only_sample_is_the_one_nothing_beats():
    """Of eight devices one to seven can sample; each is timed by hand."""
    plan = facts(stage="ppo", rows=32, tokens=10, new_tokens=20)
    times = {}
    for samplers in range(1, 8):
        apart = replace(plan, rollout_share=samplers / 8)
        times[samplers / 8] = wall(apart, step_costs(apart, 8, cluster()), cluster())
    share, seconds = overlapped(plan, 8, cluster())
    assert (share, seconds) == (min(times, key=times.get), min(times.values()))
    assert len(set(times.values())) > 3
    assert overlapped(plan, 2, cluster())[0] == 0.5  # one samples, one trains: there is no other way
    assert overlapped(plan, 1, cluster()) is None
    assert overlapped(facts(stage="sft"), 8, cluster()) is None


def test_without_a_network_to_wait_for_scaling_is_perfect_until_rows_run_out():
    rows = scale(facts(rows=64, micro_batch=1, zero=0), [1, 8, 64, 128], cluster(link=1e30, node=1e30))
    assert [row.efficiency for row in rows] == pytest.approx([1, 1, 1, 0.5])
    assert [row.nodes for row in rows] == [1, 1, 8, 16]
    assert "64 of 128 GPUs have no row" in rows[-1].notes[0]
    assert rows[0].hours == pytest.approx(10 * rows[0].seconds / 3600)
    assert rows[0].tokens_per_second == pytest.approx(64 * 125 / rows[0].seconds)


@pytest.mark.parametrize("stage", ["sft", "ppo"])
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_real_hardware_loses_efficiency_and_never_gains_time(stage, zero):
    shape = ModelShape(8_030_000_000, 8_030_000_000, 32, 4096, 2048, 128_256)
    plan = PlanFacts(stage, shape, rows=1024, steps=100, tokens=512, micro_batch=4, zero=zero, new_tokens=512 if stage == "ppo" else 0, reference=shape if stage == "ppo" else None)
    rows = scale(plan, [8, 64, 512], named("a100-80gb"))
    assert rows[0].seconds > rows[1].seconds > rows[2].seconds
    assert 1.0 == rows[0].efficiency >= rows[1].efficiency > rows[2].efficiency > 0
    assert all(row.seconds == pytest.approx(sum(phase.seconds for phase in row.phases)) for row in rows)


def test_what_cannot_be_is_refused():
    with pytest.raises(UserError, match="found 0; expected numbers of GPUs"):
        scale(facts(), [8, 0], cluster())
    with pytest.raises(UserError, match="there are a100-80gb"):
        named("z9")
    assert named("80GB") is named("A100-80gb")
