"""Secure aggregation: masks cancel bit by bit, whoever drops out when, and what each side sees tells nothing else."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from fedkdx_plugin.privacy.secure_aggregation import shamir
from fedkdx_plugin.privacy.secure_aggregation.fixed_point import Layout, largest_error
from fedkdx_plugin.privacy.secure_aggregation.masks import KeyPair, Mask, mask_key, seal, unseal
from fedkdx_plugin.privacy.secure_aggregation.messages import MASK, SHARE, STEPS, UNMASK, threshold
from fedkdx_plugin.privacy.secure_aggregation.party import Party, pair_purpose
from registry.messages import BadMessage, Message
from tests.conftest import same_state
from tests.fedkdx_plugin.privacy.room import CONTEXT, Room, make_replies, plain_mean


def assert_right(room: Room, outcome, clients: list[int]) -> None:
    """Compare with the sum of these clients' whole numbers, bit by bit, and with the plain mean to the stated error."""
    assert outcome.clients == clients and not outcome.undone
    mean = outcome.mean.reply
    total = sum(room.replies[id].meta["samples"] for id in clients)
    assert mean.meta == {"samples": total}
    assert same_state(dict(mean.tensors), room.exact(clients))
    bound = largest_error(len(room.summing.offers), total)
    for name, exact in plain_mean({id: room.replies[id] for id in clients}).items():
        float32 = exact.abs().max() * 2**-23
        assert (mean.tensors[name].double() - exact).abs().max() <= bound + float32


@pytest.mark.parametrize("clients", [2, 3, 4, 7])
def test_masks_cancel_exactly(clients):
    for _ in range(2):  # with other masks
        room = Room(make_replies(clients))
        outcome = room.run()
        assert_right(room, outcome, list(room.replies))
        assert not outcome.dropped and not outcome.notes


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("count", [1, 2])
def test_masks_of_clients_that_drop_out_are_recovered(step, count):
    room = Room(make_replies(7))
    gone = list(room.replies)[2 : 2 + count]
    room.gone = dict.fromkeys(gone, step)
    outcome = room.run()
    if step == UNMASK:  # their values had arrived
        assert_right(room, outcome, list(room.replies))
        assert not outcome.dropped and len(outcome.notes) == count
        assert f"client {gone[0]}, whose values count: no answer" in outcome.notes
    else:
        assert_right(room, outcome, [id for id in room.replies if id not in gone])
        assert outcome.dropped == dict.fromkeys(gone, "no answer")


def test_clients_may_drop_out_at_every_step_as_long_as_the_threshold_is_there():
    room = Room(make_replies(9))
    ids = list(room.replies)
    room.gone = {ids[0]: SHARE, ids[4]: MASK, ids[8]: UNMASK}
    outcome = room.run()
    assert_right(room, outcome, [id for id in ids if id not in (ids[0], ids[4])])


@pytest.mark.parametrize("step", STEPS)
def test_with_fewer_than_the_threshold_there_is_no_sum(step):
    room = Room(make_replies(7))
    assert threshold(7) == 5
    room.gone = dict.fromkeys(list(room.replies)[:3], step)
    outcome = room.run()
    assert outcome.mean is None and outcome.clients == []
    assert outcome.undone == f"4 of 7 clients took step '{step}'; 5 are needed"


def test_fewer_replies_than_asked_for_are_not_unmasked():
    """The server does not learn a sum of so few: it does not ask for the shares."""
    room = Room(make_replies(3), threshold_least=3)
    room.gone = {0: MASK}
    assert room.run().undone == "2 of 3 clients took step 'mask'; 3 are needed"
    assert not any(step == UNMASK for _, step in room.requests)


def test_the_threshold_is_two_thirds_and_more_than_half():
    assert [threshold(n) for n in (2, 3, 4, 5, 6, 7, 9, 10, 100)] == [2, 2, 3, 4, 4, 5, 6, 7, 67]
    assert all(n / 2 < threshold(n) <= n for n in range(2, 1000))


def high_bits(values: np.ndarray) -> np.ndarray:
    """Count values by their four highest bits."""
    return np.bincount((values.reshape(-1).view(np.uint64) >> np.uint64(60)).astype(int), minlength=16)


def chi_squared(counts: np.ndarray) -> float:
    expected = counts.sum() / len(counts)
    return float(((counts - expected) ** 2 / expected).sum())


MOST = 50.0  # of χ² with 15 degrees of freedom: p < 1e-5


def test_what_the_server_sees_of_a_client_is_uniform():
    """Masked values of a client that sends zeros, and of one that sends ones."""
    for value in (0.0, 1.0):
        replies = {id: Message({"w": torch.full((4096,), value)}, {"samples": 1}) for id in range(3)}
        room = Room(replies)
        assert room.run().mean.reply.tensors["w"].eq(value).all()
        for id in replies:
            assert chi_squared(high_bits(room.answers[id, MASK].tensors["masked"].numpy())) < MOST


def known_to(room: Room, colluding: list[int], target: int) -> np.ndarray:
    """Return the target's masked values less all masks that colluding clients and the server can work out."""
    values = room.answers[target, MASK].tensors["masked"].numpy().copy().view(np.uint64)
    mask = Mask(values)
    for id in colluding:
        key = room.parties[id]._for_masks.agree(
            room.summing.offers[target].for_masks, pair_purpose(CONTEXT, id, target)
        )
        (mask.subtract if target > id else mask.add)(key)
    # b_u of all clients in the sum is what the server learns to unmask
    mask.subtract(mask_key(room.parties[target]._seed))
    return values


def test_colluding_clients_and_the_server_see_nothing_of_two_others():
    """Two honest ones of five: each one's values stay masked by what the two share; their sum is all that is left."""
    replies = {id: Message({"w": torch.full((4096,), float(id))}, {"samples": 1}) for id in range(5)}
    room = Room(replies)
    room.run()
    colluding, honest = [0, 2, 4], [1, 3]
    assert len(colluding) == threshold(5) - 1
    left = [known_to(room, colluding, id) for id in honest]
    layout = Layout.of(replies[0])
    plain = [layout.encode(replies[id].tensors, 1, 5)[0] for id in honest]
    for values in left:
        assert chi_squared(high_bits(values)) < MOST
        assert not any(np.isin(values[: layout.size], own[: layout.size]).any() for own in plain)
    assert np.array_equal(left[0] + left[1], plain[0] + plain[1])  # modulo 2^64


def test_shares_that_colluding_clients_hold_give_no_mask_and_one_more_does():
    room = Room(make_replies(5))
    room.run()
    target = 0
    held = {id: party._held[target] for id, party in room.parties.items()}
    secret = room.parties[target]._seed, room.parties[target]._for_masks.private
    for kind in (0, 1):
        for count, gives in ((threshold(5) - 1, False), (threshold(5), True)):
            for chosen in itertools.combinations(held, count):
                points = [id + 1 for id in chosen]
                try:
                    found = shamir.combine({id + 1: held[id][kind] for id in chosen}, shamir.weights(points))
                except ValueError:
                    found = None
                assert (found == secret[kind]) == gives


def test_no_client_gives_both_shares_of_another():
    """One step of unmasking is answered, once, with one share of each."""
    room = Room(make_replies(4))
    room.gone = {9: MASK}
    room.run()
    for id, party in room.parties.items():
        answer = room.answers[id, UNMASK].tensors["shares"]
        assert answer.shape == (4, shamir.SHARE_BYTES)
        with pytest.raises(BadMessage, match="not what comes next"):
            party.answer(UNMASK, Message({}, {"clients": [0, 3, 6, 9]}))


def test_keys_are_new_in_every_round():
    one, other = (Room(make_replies(3)) for _ in range(2))
    for id in one.replies:
        assert not torch.equal(one.offers[id].tensors["public"], other.offers[id].tensors["public"])


def test_keys_of_another_context_are_others():
    pair, other = KeyPair.new(), KeyPair.new()
    keys = {
        pair.agree(other.public, pair_purpose(context, 1, 2)) for context in ("a, round 1", "a, round 2", "b, round 1")
    }
    assert len(keys) == 3
    assert pair.agree(other.public, pair_purpose("x", 1, 2)) == other.agree(pair.public, pair_purpose("x", 2, 1))


def test_boxes_are_opened_by_their_key_alone():
    key, another = KeyPair.new().private, KeyPair.new().private
    box = seal(key, b"shares", b"about")
    assert unseal(key, box, b"about") == b"shares"
    for wrong in ((another, box, b"about"), (key, box, b"other"), (key, box[:-1] + bytes([box[-1] ^ 1]), b"about")):
        with pytest.raises(ValueError, match="cannot be opened"):
            unseal(*wrong)


def test_clipped_values_are_counted_in_the_sum():
    replies = make_replies(3)
    replies[3] = Message({"w": torch.full((6,), 1e9), "b": torch.zeros(2, 1)}, {"samples": 1})
    room = Room(replies)
    outcome = room.run()
    assert outcome.notes == ["6 of 3 x 8 values were beyond ±65536 and were clipped"]
    assert room.parties[3].clipped == 6 and room.parties[0].clipped == 0
    assert same_state(dict(outcome.mean.reply.tensors), room.exact([0, 3, 6]))


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (Message({"w": torch.ones(2)}, {"samples": 1, "steps": 4}), "steps cannot be summed"),
        (Message({"w": torch.ones(2)}), "cannot be summed"),
        (Message({"w": torch.ones(2)}, {"samples": 2**20 + 1}), "at most 1048576"),
        (Message({"w": torch.ones(2)}, {"samples": 0}), "0 samples"),
        (Message({"w": torch.ones(2, dtype=torch.uint8)}, {"samples": 1}), "cannot be added up"),
    ],
)
def test_replies_that_cannot_be_summed_are_refused_by_their_client(reply, reason):
    with pytest.raises(BadMessage, match=reason):
        Party(0, reply, CONTEXT)
