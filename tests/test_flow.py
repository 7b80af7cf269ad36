"""The choreography over small fakes: who is asked, how often, and what happens when somebody fails."""

import asyncio
import hashlib
import io
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
from PIL import Image

from omnilmm.cache.key import KeyRing
from omnilmm.cache.store import open_store
from omnilmm.card import ModelCard
from omnilmm.config import CacheConfig, Family, ImageLimits, ImagePolicy, InputHandling
from omnilmm.errors import ContextLengthExceeded, DeadlineExceeded, ImageError, InvalidRequest, OmniError, ReplicaLost
from omnilmm.flow import CLIENT_LEFT, ChatFlow
from omnilmm.image.pool import InlinePreparer
from omnilmm.messages import (
    ChatRequest,
    Conversation,
    Delta,
    Embedding,
    Encoded,
    Finished,
    FinishReason,
    Grammar,
    GrammarKind,
    ImagePart,
    ImageSource,
    Prefill,
    TextPart,
    TokenBatch,
    Turn,
)
from omnilmm.observe import ImageResolved, RequestFinished, Retried
from omnilmm.pipeline import LocalDecoder, SystemClock
from omnilmm.prompt.template import load_template
from omnilmm.retries import Deadline, Retries, RetryBudget

SECRET = b"a secret of thirty-two bytes.... "
ANSWER = (549, 374, 649, 539, 710)


def png(colour):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), colour).save(buffer, "PNG")
    return buffer.getvalue()


RED, BLUE = png("red"), png("blue")


def ask(*parts, **changes):
    content = tuple(ImagePart(p, f"part[{i}]") if isinstance(p, bytes) else TextPart(p) for i, p in enumerate(parts))
    return ChatRequest("r", Conversation((Turn("user", content),)), max_tokens=8, **changes)


class FakeEncoder:
    """Vectors that name the picture. `failures` are raised first; `gate` holds every call."""

    def __init__(self, store):
        self.store = store
        self.calls = []
        self.failures = []
        self.entered = asyncio.Event()
        self.gate = asyncio.Event()
        self.gate.set()
        self.keeps = True

    async def encode(self, picture, *, key, by_value, timeout_s, keep=True):
        self.calls.append((key, by_value))
        self.entered.set()
        if self.failures:
            raise self.failures.pop(0)
        await self.gate.wait()
        embedding = Embedding("float32", (1, 1), hashlib.sha256(picture.square).digest()[:4])
        stored = self.keeps and keep and not by_value and await self.store.put(key, embedding)
        return Encoded(None if stored else embedding, stored, 0.01, len(embedding.data) if keep else 0)


class FakeDecoder:
    """Emits ANSWER one token a batch, going on from `emitted`. It is lost at the position that `scripts` says for the
    call, and looks for vectors as the real one does, but for the pictures in `kv`."""

    def __init__(self, store):
        self.find = partial(LocalDecoder(None, store)._find, deadline=Deadline(SystemClock(), 60.0))
        self.calls = []
        self.entered = asyncio.Event()
        self.scripts = []
        self.num_closed = 0
        self.kv = ()

    async def generate(self, call, *, affinity):
        self.calls.append((call, affinity))
        self.entered.set()
        script = self.scripts.pop(0) if self.scripts else None
        try:
            lacking = [image for i, image in enumerate(call.images) if image.embedding is None and i not in self.kv]
            found = {key: await self.find(key) for key in dict.fromkeys(image.key for image in lacking)}
            missing = tuple(key for key, embedding in found.items() if embedding is None)
            if missing:
                yield TokenBatch(missing=missing)
                return
            fetched = sum(len(embedding.data) for embedding in found.values())
            prefill = Prefill(len(call.prompt.ids), 3, self.kv, 0.0, fetched)
            for position in range(len(call.emitted), len(ANSWER)):
                if script is not None and position == script:
                    raise ReplicaLost("gone")
                last = position == len(ANSWER) - 1
                yield TokenBatch((ANSWER[position],), prefill=prefill, finish=FinishReason.LENGTH if last else None)
                prefill = None
        finally:
            self.num_closed += 1


class Notes:
    def __init__(self):
        self.events = []

    def emit(self, event):
        self.events.append(event)

    def of(self, kind):
        return [event for event in self.events if isinstance(event, kind)]


@pytest.fixture(scope="module")
def card(data):
    folder = data / "minicpm-v-tiny"
    return ModelCard(
        name="m",
        family=Family.OMNILMM_3B,
        fingerprint="f",
        dtype="float32",
        handling=InputHandling.SAFE,
        policy=ImagePolicy(28, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        max_context=200,
        vocab_size=820,
        template=load_template(Family.OMNILMM_3B, folder),
    )


class House:
    """A flow with all its neighbours in reach."""

    def __init__(self, card, *, sole=True):
        self.notes = Notes()
        self.store = open_store(CacheConfig(), secret=SECRET, observer=self.notes, clock=SystemClock(), sole=sole)
        self.encoder = FakeEncoder(self.store)
        self.decoder = FakeDecoder(self.store)
        self.retries = RetryBudget()
        self.flow = ChatFlow(
            card,
            preparer=InlinePreparer(ImageLimits()),
            store=self.store,
            encoder=self.encoder,
            decoder=self.decoder,
            keys=KeyRing(SECRET),
            limits=ImageLimits(),
            observer=self.notes,
            clock=SystemClock(),
            retries=self.retries,
        )

    async def answer(self, request):
        events = [event async for event in self.flow.answer(request)]
        assert isinstance(events[-1], Finished)
        return "".join(event.text for event in events[:-1]), events[-1]


@pytest.fixture
async def house(card):
    made = House(card)
    yield made
    made.store.check_integrity()
    await made.store.aclose()


def sources(finished):
    return [image.source for image in finished.usage.images]


async def test_a_picture_is_encoded_once_and_then_remembered(house):
    text, first = await house.answer(ask(RED, "What?"))
    again, second = await house.answer(ask(RED, "What?"))
    assert text == again
    assert text
    assert sources(first) == [ImageSource.ENCODED]
    assert sources(second) == [ImageSource.CACHE]
    assert len(house.encoder.calls) == 1
    assert first.usage.image_tokens == 64
    assert first.usage.completion_tokens == len(ANSWER)
    assert (first.usage.images[0].width, first.usage.images[0].height) == (8, 6)


async def test_the_same_picture_twice_in_one_request_is_one_encode(house):
    _, finished = await house.answer(replace(ask(RED, RED, "Same?")))
    assert len(house.encoder.calls) == 1
    assert sources(finished) == [ImageSource.ENCODED, ImageSource.ENCODED]
    call, _ = house.decoder.calls[0]
    assert len({image.key for image in call.images}) == 1
    assert len(call.images) == 2


async def test_a_re_encoded_file_with_the_same_pixels_is_the_same_picture(house):
    buffer = io.BytesIO()
    Image.open(io.BytesIO(RED)).save(buffer, "PNG", compress_level=0)
    await house.answer(ask(RED, "What?"))
    _, finished = await house.answer(ask(buffer.getvalue(), "What?"))
    assert buffer.getvalue() != RED
    assert sources(finished) == [ImageSource.CACHE]


async def test_another_scope_shares_nothing(house):
    await house.answer(ask(RED, "What?", scope="a"))
    _, finished = await house.answer(ask(RED, "What?", scope="b"))
    assert sources(finished) == [ImageSource.ENCODED]


def count_lookups(house):
    """A semaphore that goes up by one for each picture looked up from now on."""
    lookup, looked_up = house.store.lookup, asyncio.Semaphore(0)

    async def counted(keys):
        found = await lookup(keys)
        looked_up.release()
        return found

    house.store.lookup = counted
    return looked_up


async def test_simultaneous_requests_for_one_picture_share_the_flight(house):
    house.encoder.gate.clear()
    leader = asyncio.create_task(house.answer(ask(RED, "First")))
    await house.encoder.entered.wait()
    looked_up = count_lookups(house)
    followers = [asyncio.create_task(house.answer(ask(RED, f"Question {i}"))) for i in range(4)]
    for _ in followers:
        await looked_up.acquire()
    house.encoder.gate.set()
    answers = await asyncio.gather(leader, *followers)
    assert len(house.encoder.calls) == 1
    assert [s for _, f in answers for s in sources(f)] == [ImageSource.ENCODED] + [ImageSource.FLIGHT] * 4


@pytest.fixture
def decoding(house):
    """Calls of the preparer, held until `gate` is set."""
    prepare, calls, gate = house.flow._gatherer._preparer.prepare, [], asyncio.Event()

    async def held(data, **options):
        calls.append(options["param"])
        await gate.wait()
        return await prepare(data, **options)

    house.flow._gatherer._preparer = SimpleNamespace(prepare=held)
    return SimpleNamespace(calls=calls, gate=gate)


async def until_waiting(num):
    """Let the loop turn until so many tasks stand still; they have nothing else to wait for here."""
    for _ in range(20 * num):
        await asyncio.sleep(0)


async def test_a_file_that_many_send_at_once_is_decoded_once(house, decoding):
    asking = [asyncio.create_task(house.answer(ask(RED, f"Question {i}"))) for i in range(20)]
    await until_waiting(20)
    decoding.gate.set()
    await asyncio.gather(*asking)
    assert len(decoding.calls) == 1


async def test_a_file_is_decoded_by_the_next_one_when_the_first_leaves(house, decoding):
    first, *others = [asyncio.create_task(house.answer(ask(RED, f"Question {i}"))) for i in range(3)]
    await until_waiting(3)
    first.cancel()
    await until_waiting(3)
    decoding.gate.set()
    await asyncio.gather(*others)
    assert len(decoding.calls) == 2


async def test_a_bad_file_is_refused_to_each_at_its_own_place(house, decoding):
    bad = RED[:40] + bytes(60)
    asking = [asyncio.create_task(house.answer(ask(*before, bad, "What?"))) for before in ((), (BLUE,))]
    await until_waiting(4)
    decoding.gate.set()
    refusals = await asyncio.gather(*asking, return_exceptions=True)
    assert all(isinstance(refusal, ImageError) for refusal in refusals)
    assert [refusal.param for refusal in refusals] == ["part[0]", "part[1]"]


async def test_a_failed_leader_hands_over(house):
    house.encoder.failures = [OmniError("this picture, this time")]
    house.encoder.gate.clear()
    leader = asyncio.create_task(house.answer(ask(RED, "First")))
    followers = [asyncio.create_task(house.answer(ask(RED, "Second"))) for _ in range(3)]
    await house.encoder.entered.wait()
    house.encoder.gate.set()
    results = await asyncio.gather(leader, *followers, return_exceptions=True)
    assert sum(isinstance(result, OmniError) for result in results) == 1
    assert len(house.encoder.calls) == 2


async def test_text_alone_never_meets_the_vision_pool(house):
    _, finished = await house.answer(ask("Hello?"))
    assert house.encoder.calls == []
    assert finished.usage.images == ()
    assert finished.usage.image_tokens == 0


async def test_a_picture_whose_blocks_are_in_kv_is_told_so(house):
    await house.answer(ask(RED, "What?"))
    house.decoder.kv = (0,)
    _, finished = await house.answer(ask(RED, "What?"))
    assert sources(finished) == [ImageSource.KV]
    assert [event.source for event in house.notes.of(ImageResolved)] == [ImageSource.ENCODED, ImageSource.KV]


async def test_vectors_lost_between_lookup_and_use_are_brought_by_value(house):
    await house.answer(ask(RED, "What?"))
    get, house.store.get = house.store.get, lambda key: asyncio.sleep(0, None)
    text, finished = await house.answer(ask(RED, "What?"))
    house.store.get = get
    assert text
    assert sources(finished) == [ImageSource.ENCODED]
    assert house.encoder.calls[-1][1] is True, "asked by value"
    assert house.decoder.calls[-1][0].images[0].embedding is not None


async def test_without_a_shared_store_vectors_travel_by_value(card):
    house = House(card, sole=False)
    _, first = await house.answer(ask(RED, "What?"))
    _, second = await house.answer(ask(RED, "What?"))
    assert house.encoder.calls == [(house.encoder.calls[0][0], True)]
    assert sources(first) == [ImageSource.ENCODED]
    assert sources(second) == [ImageSource.CACHE]
    assert house.decoder.calls[0][0].images[0].embedding is not None
    await house.store.aclose()


@pytest.mark.parametrize("lost_at", [0, 1, 4])
async def test_a_decoder_lost_mid_stream_is_resumed_without_a_seam(house, lost_at):
    whole, undisturbed = await house.answer(ask("Hello?", seed=7))
    house.decoder.scripts = [lost_at]
    text, finished = await house.answer(ask("Hello?", seed=7))
    assert text == whole
    assert replace(finished.usage, decode_s=0.0) == replace(undisturbed.usage, decode_s=0.0)
    first, second = house.decoder.calls[1][0], house.decoder.calls[2][0]
    assert second.emitted == ANSWER[:lost_at]
    assert second.sampling == first.sampling
    assert house.notes.of(Retried) == [Retried("decode")]


async def test_retries_end(house):
    house.decoder.scripts = [1, 2, 3]
    with pytest.raises(ReplicaLost):
        await house.answer(ask("Hello?"))
    assert len(house.decoder.calls) == Retries.max_attempts


async def test_retries_stop_when_the_budget_is_spent(house):
    while house.retries.try_withdraw():
        pass
    house.decoder.scripts = [0]
    with pytest.raises(ReplicaLost):
        await house.answer(ask("Hello?"))
    assert len(house.decoder.calls) == 1


async def test_streams_that_had_begun_are_resumed_when_retries_are_spent(house):
    """As many as a decoder holds: they all go down with it at one blow."""
    while house.retries.try_withdraw():
        pass
    num_streams = int(Retries.resume_reserve)
    house.decoder.scripts = [1, None] * num_streams
    await asyncio.gather(*(house.answer(ask("Hello?")) for _ in range(num_streams)))
    assert len(house.decoder.calls) == 2 * num_streams
    assert len(house.notes.of(Retried)) == num_streams


def test_the_retry_budget_refills_by_a_tenth():
    budget = RetryBudget(ratio=0.1, reserve=1.0)
    assert budget.try_withdraw()
    assert not budget.try_withdraw()
    for _ in range(11):  # eleven, since ten tenths are a little less than one
        budget.deposit()
    assert budget.try_withdraw()
    assert not budget.try_withdraw()


async def test_a_lost_vision_replica_is_retried(house):
    house.encoder.failures = [ReplicaLost("gone")]
    _, finished = await house.answer(ask(RED, "What?"))
    assert sources(finished) == [ImageSource.ENCODED]
    assert house.notes.of(Retried) == [Retried("encode")]


async def test_a_stop_string_ends_the_answer_and_the_stream_beneath(house, card):
    whole, _ = await house.answer(ask("Hello?"))
    stop = whole[4:6]
    text, finished = await house.answer(ask("Hello?", stop=(stop,)))
    assert text == whole[: whole.index(stop)]
    assert finished.finish is FinishReason.STOP
    assert finished.usage.completion_tokens < len(ANSWER)
    assert house.decoder.num_closed == 2


async def test_closing_the_answer_closes_everything(house):
    answer = house.flow.answer(ask(RED, "What?"))
    assert isinstance(await anext(answer), Delta)
    await answer.aclose()
    assert house.decoder.num_closed == 1
    assert house.notes.of(RequestFinished)[-1].status == CLIENT_LEFT


async def test_a_client_that_leaves_while_its_picture_is_encoded_leaves_no_lease(house):
    house.encoder.gate.clear()
    leaving = asyncio.create_task(house.answer(ask(RED, "What?")))
    await house.encoder.entered.wait()
    leaving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaving
    house.store.check_integrity()
    house.encoder.gate.set()
    _, finished = await house.answer(ask(RED, "What?"))
    assert sources(finished) == [ImageSource.ENCODED]


async def test_what_does_not_fit_is_refused_before_any_picture_is_touched(house):
    with pytest.raises(ContextLengthExceeded):
        await house.answer(replace(ask(RED, "What?"), max_tokens=150))
    with pytest.raises(ContextLengthExceeded):
        await house.answer(ask(RED, "word " * 1000))
    assert house.encoder.calls == []
    assert house.notes.of(RequestFinished)[-1].status == 400


async def test_a_bad_picture_fails_its_request_and_names_its_place(house):
    with pytest.raises(ImageError) as refusal:
        await house.answer(ask(BLUE, RED[:40], "What?"))
    assert refusal.value.param == "part[1]"


async def test_the_deadline_holds_while_waiting_for_another_flight(house):
    house.encoder.gate.clear()
    leader = asyncio.create_task(house.answer(ask(RED, "What?")))
    await house.encoder.entered.wait()
    with pytest.raises(DeadlineExceeded):
        await house.answer(ask(RED, "What?", timeout_s=0.05))
    house.encoder.gate.set()
    await leader


async def test_affinity_follows_the_opening_of_a_conversation_or_its_session(house):
    opening = Turn("user", (ImagePart(RED, "p"), TextPart("What?")))
    more = (opening, Turn("assistant", (TextPart("A square."),)), Turn("user", (TextPart("And?"),)))
    for conversation in (Conversation((opening,)), Conversation(more)):
        await house.answer(ChatRequest("r", conversation, max_tokens=8))
    await house.answer(ask(BLUE, "What?"))
    await house.answer(ask(RED, "What?", session="s"))
    await house.answer(ask(BLUE, "Else?", session="s"))
    one, two, other, session, same_session = (affinity for _, affinity in house.decoder.calls)
    assert one == two
    assert len({one, other, session}) == 3
    assert session == same_session


# -- the decoder is asked before the picture is encoded -----------------------------------------------


LATER = (Turn("user", (TextPart("Hello?"),)), Turn("assistant", (TextPart("Yes."),)))


def ask_later(*pictures, **changes):
    """A second turn that brings pictures."""
    parts = tuple(ImagePart(picture, f"part[{i}]") for i, picture in enumerate(pictures))
    last = Turn("user", (*parts, TextPart("What?")))
    return ChatRequest("r", Conversation((*LATER, last)), max_tokens=8, **changes)


async def test_a_later_turn_reaches_the_decoder_while_its_picture_is_encoded(house):
    house.encoder.gate.clear()
    asking = asyncio.create_task(house.answer(ask_later(RED)))
    await house.encoder.entered.wait()
    await house.decoder.entered.wait()
    house.encoder.gate.set()
    _, finished = await asking
    assert sources(finished) == [ImageSource.ENCODED]
    assert (len(house.encoder.calls), len(house.decoder.calls)) == (1, 1), "one call each: it waited for the flight"
    assert finished.usage.embedding_bytes == 4


@pytest.mark.parametrize(("num_words", "begins"), [(5, False), (150, True)])
async def test_a_first_turn_does_so_if_a_long_text_comes_before_its_picture(card, num_words, begins):
    house = House(replace(card, max_context=700))
    house.encoder.gate.clear()
    turns = (Turn("user", (TextPart("word " * num_words),)), Turn("user", (ImagePart(RED, "p"), TextPart("What?"))))
    asking = asyncio.create_task(house.answer(ChatRequest("r", Conversation(turns), max_tokens=8)))
    await house.encoder.entered.wait()
    if begins:
        await house.decoder.entered.wait()
    assert house.decoder.entered.is_set() == begins
    house.encoder.gate.set()
    _, finished = await asking
    assert sources(finished) == [ImageSource.ENCODED]
    await house.store.aclose()


async def test_kv_answers_a_later_turn_that_the_store_has_forgotten(house):
    """The vectors are made again, for others, but nobody waits for them."""
    house.encoder.gate.clear()
    house.decoder.kv = (0,)
    _, finished = await house.answer(ask_later(RED))
    assert sources(finished) == [ImageSource.KV]
    assert finished.usage.embedding_bytes == 0
    house.store.check_integrity()


async def test_a_picture_that_fails_while_the_decoder_waits_fails_the_request(house):
    house.encoder.failures = [OmniError("this picture")]
    house.encoder.gate.clear()
    with pytest.raises(OmniError, match="this picture"):
        await house.answer(ask_later(RED))
    assert house.decoder.num_closed == len(house.decoder.calls)
    house.encoder.gate.set()
    _, finished = await house.answer(ask_later(RED))
    assert sources(finished) == [ImageSource.ENCODED]


async def test_vectors_the_store_refused_follow_by_value(house):
    house.encoder.keeps = False
    _, finished = await house.answer(ask_later(RED))
    assert sources(finished) == [ImageSource.ENCODED]
    assert len(house.encoder.calls) == 1
    assert finished.usage.embedding_bytes == 4


async def test_without_a_shared_store_the_decoder_is_not_asked_too_early(card):
    house = House(card, sole=False)
    house.encoder.gate.clear()
    asking = asyncio.create_task(house.answer(ask_later(RED)))
    await house.encoder.entered.wait()
    assert not house.decoder.entered.is_set()
    house.encoder.gate.set()
    await asking
    assert len(house.decoder.calls) == 1
    await house.store.aclose()


async def test_a_decoder_lost_while_it_waits_for_a_picture_is_replaced(house):
    house.decoder.scripts = [0]
    _, finished = await house.answer(ask_later(RED))
    assert sources(finished) == [ImageSource.ENCODED]
    assert (len(house.encoder.calls), len(house.decoder.calls)) == (1, 2)


async def test_the_pictures_of_a_request_are_encoded_side_by_side(card):
    """So that they spread over the replicas of the vision pool."""
    house = House(replace(card, max_context=700))
    house.encoder.gate.clear()
    asking = asyncio.create_task(house.answer(ask(*(png((i, 0, 0)) for i in range(4)), "Compare.")))
    while len(house.encoder.calls) < 4:
        await asyncio.sleep(0.001)
        assert not asking.done()
    house.encoder.gate.set()
    _, finished = await asking
    assert sources(finished) == [ImageSource.ENCODED] * 4
    assert finished.usage.encode_s == pytest.approx(0.04)
    await house.store.aclose()


# -- what an answer took ------------------------------------------------------------------------------


async def test_usage_tells_what_was_encoded_and_moved(house):
    _, first = await house.answer(ask(RED, RED, "Same?"))
    assert first.usage.encode_s == pytest.approx(0.01)
    assert first.usage.embedding_bytes == 4, "one picture, be it shown twice"
    assert first.usage.decode_s >= 0.0
    _, other = await house.answer(ask(RED, "Another conversation?"))
    assert (other.usage.encode_s, other.usage.embedding_bytes) == (0.0, 4)
    house.decoder.kv = (0,)
    _, turn_two = await house.answer(ask(RED, "Another conversation?"))
    assert (turn_two.usage.encode_s, turn_two.usage.embedding_bytes) == (0.0, 0)


async def test_usage_counts_each_token_once_and_every_byte_however_often_a_decoder_is_lost(house):
    house.decoder.scripts = [2, 4]
    _, finished = await house.answer(ask(RED, "What?"))
    assert finished.usage.completion_tokens == len(ANSWER)
    assert finished.usage.embedding_bytes == 3 * 4, "three replicas fetched them"


async def test_retries_of_a_storm_are_few(card):
    """Every decoder call is lost: a tenth of the requests, and what was saved up, are tried again."""
    house = House(card)
    for _ in range(200):
        await house.answer(ask("Hello?"))
    house.decoder.calls.clear()
    num_requests = 200
    house.decoder.scripts = [0] * 1000
    for _ in range(num_requests):
        with pytest.raises(ReplicaLost):
            await house.answer(ask("Hello?"))
    assert num_requests < len(house.decoder.calls) <= 1.2 * num_requests
    house.decoder.scripts = []
    await house.answer(ask("Hello?"))
    await house.store.aclose()


def accounts(house, request):
    told = []
    return told, house.flow.answer(request, account=told.append)


async def test_the_account_of_a_whole_answer_is_its_usage(house):
    told, answer = accounts(house, ask(RED, "What?"))
    events = [event async for event in answer]
    assert told == [events[-1].usage]
    assert told[0].kept_bytes == 4


async def test_the_account_of_an_answer_that_is_closed_tells_what_came_of_it(house):
    told, answer = accounts(house, ask(RED, "What?"))
    await anext(answer)
    await answer.aclose()
    (usage,) = told
    assert (usage.completion_tokens, usage.image_tokens, usage.kept_bytes) == (1, 64, 4)
    finished = house.notes.of(RequestFinished)[-1]
    told_to_observer = (finished.status, finished.prompt_tokens, finished.completion_tokens)
    assert told_to_observer == (CLIENT_LEFT, usage.prompt_tokens, 1)
    assert usage.prompt_tokens > 64


async def test_a_prompt_that_no_decoder_read_does_not_count(house):
    house.decoder.scripts = [0, 0, 0]
    told, answer = accounts(house, ask(RED, BLUE, "What?"))
    with pytest.raises(ReplicaLost):
        await anext(answer)
    (usage,) = told
    assert (usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens, usage.image_tokens) == (0, 0, 0, 0)
    assert [image.source for image in usage.images] == [ImageSource.ENCODED] * 2, "but its pictures were encoded"
    assert usage.encode_s == pytest.approx(0.02)
    assert len(house.notes.of(ImageResolved)) == 2


async def test_a_refused_request_has_taken_nothing(house):
    told, answer = accounts(house, ask("word " * 1000))
    with pytest.raises(ContextLengthExceeded):
        await anext(answer)
    assert [(usage.prompt_tokens, usage.completion_tokens, usage.images) for usage in told] == [(0, 0, ())]


async def test_an_unforeseen_failure_is_not_the_client_s(house):
    house.flow.decoder = None
    with pytest.raises(AttributeError):
        await house.answer(ask("Hello?"))
    assert house.notes.of(RequestFinished)[-1].status == 500


# -- pictures that are not kept -----------------------------------------------------------------------


async def test_a_picture_that_may_not_be_kept_is_answered_and_forgotten(house):
    _, first = await house.answer(ask(RED, "What?", may_cache=False))
    assert sources(first) == [ImageSource.ENCODED]
    assert first.usage.kept_bytes == 0
    assert house.encoder.calls[-1][1] is True, "by value"
    assert house.decoder.calls[0][0].images[0].embedding is not None
    assert len(house.store._memory) == 0, "neither vectors nor what the file shows"
    _, second = await house.answer(ask(RED, "What?"))
    assert sources(second) == [ImageSource.ENCODED]
    _, third = await house.answer(ask(RED, "What?", may_cache=False))
    assert sources(third) == [ImageSource.CACHE], "what is there already serves everybody"


async def test_a_decoder_is_not_asked_early_for_what_will_not_be_stored(house):
    house.encoder.gate.clear()
    asking = asyncio.create_task(house.answer(ask_later(RED, may_cache=False)))
    await house.encoder.entered.wait()
    assert not house.decoder.entered.is_set()
    house.encoder.gate.set()
    await asking
    assert (len(house.encoder.calls), len(house.decoder.calls)) == (1, 1)


async def test_those_who_wait_for_a_picture_that_is_not_kept_get_it_too(house):
    house.encoder.gate.clear()
    leader = asyncio.create_task(house.answer(ask(RED, "First", may_cache=False)))
    await house.encoder.entered.wait()
    looked_up = count_lookups(house)
    follower = asyncio.create_task(house.answer(ask(RED, "Second")))
    await looked_up.acquire()
    house.encoder.gate.set()
    (_, first), (_, second) = await asyncio.gather(leader, follower)
    assert len(house.encoder.calls) == 1
    assert (sources(first), sources(second)) == ([ImageSource.ENCODED], [ImageSource.FLIGHT])


async def test_vectors_lost_before_use_are_made_again_and_not_kept(house):
    await house.answer(ask(RED, "What?"))
    get, house.store.get = house.store.get, lambda key: asyncio.sleep(0, None)
    _, finished = await house.answer(ask(RED, "What?", may_cache=False))
    house.store.get = get
    assert sources(finished) == [ImageSource.ENCODED]
    assert finished.usage.kept_bytes == 0


# -- raw prompts, forms, counting ---------------------------------------------------------------------


async def test_a_raw_text_goes_to_the_model_as_it_stands(house, card):
    text = "Once upon <image> a time"
    await house.answer(ChatRequest("r", Conversation(()), raw=text, max_tokens=8))
    prompt = house.decoder.calls[0][0].prompt
    tokenizer = card.template.tokenizer
    assert prompt.ids == (tokenizer.bos_id, *tokenizer.encode_parsed(text))
    assert tokenizer.special_ids["<image>"] in prompt.ids
    assert (prompt.spans, prompt.penalty_ids) == ((), prompt.ids)


async def test_raw_ids_are_taken_as_they_are(house):
    await house.answer(ChatRequest("r", Conversation(()), raw=(5, 1, 5), max_tokens=8))
    prompt = house.decoder.calls[0][0].prompt
    assert (prompt.ids, prompt.penalty_ids) == ((5, 1, 5), (5, 1, 5))


@pytest.mark.parametrize("raw", [(), (5, 820), (-1,), "a \ud800 b", (7,) * 201, "word " * 10_000, (7,) * 195])
async def test_raw_prompts_that_cannot_be_are_refused(house, raw):
    with pytest.raises(InvalidRequest) as refusal:
        await house.answer(ChatRequest("r", Conversation(()), raw=raw, max_tokens=8))
    assert refusal.value.param == "prompt"
    assert house.decoder.calls == []


async def test_raw_prompts_with_one_opening_meet_one_decoder(house):
    for raw in ((3,) * 64 + (4,), (3,) * 64 + (5,), (3,) * 63 + (4,)):
        await house.answer(ChatRequest("r", Conversation(()), raw=raw, max_tokens=8))
    one, same, other = (affinity for _, affinity in house.decoder.calls)
    assert one == same != other


async def test_the_form_and_the_adapter_reach_the_decoder(house):
    form = Grammar(GrammarKind.JSON_OBJECT)
    await house.answer(ask("Hello?", grammar=form, adapter="a"))
    call = house.decoder.calls[0][0]
    assert (call.sampling.grammar, call.adapter) == (form, "a")


async def test_a_prompt_can_be_counted_without_being_answered(house):
    counted = house.flow.count(ask(RED, "What?"))
    await house.answer(ask(RED, "What?"))
    assert counted == house.decoder.calls[0][0].prompt
    assert len(house.decoder.calls) == 1
    with pytest.raises(ContextLengthExceeded):
        house.flow.count(ask("word " * 1000))
