"""Sequences of text and audio: patches, delays, the interleave of spoken replies, special ids, conversations."""

import itertools

import pytest
import torch

from openmimo.core.errors import DataError
from openmimo.data.tokenizer import Tokenizer
from openmimo.engine.audio.form import SpeechForm
from openmimo.model.audio.conversation import conversation_parts, reply_parts
from openmimo.model.audio.language_config import tiny_audio
from openmimo.model.audio.sequence import (
    ALL_SPECIAL_TOKENS,
    AUDIO_TOKENS,
    AudioPart,
    AudioTokens,
    SequenceBuilder,
    SpeechPart,
    TextPart,
    delayed,
    packed,
    to_patches,
    undelayed,
)

TEXTS = ["hello hello hello world, what a fine day it is to speak"] * 5


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(TEXTS, 300, ALL_SPECIAL_TOKENS)


@pytest.fixture(scope="module")
def builder(tokenizer):
    return SequenceBuilder(tokenizer, tiny_audio())


def codes_of(frames, seed=0, codebooks=8):
    return torch.randint(0, 128, (frames, codebooks), generator=torch.Generator().manual_seed(seed))


def test_patches_and_delays_are_undone():
    for frames, codebooks, patch_frames in itertools.product((1, 3, 4, 5, 17), (1, 2, 5, 8, 20), (1, 4, 7)):
        codes_FQ = codes_of(frames, codebooks=codebooks)
        codes_PHQ = to_patches(codes_FQ, patch_frames)
        assert codes_PHQ.shape == (-(-frames // patch_frames), patch_frames, codebooks)
        assert torch.equal(codes_PHQ.flatten(0, 1)[:frames], codes_FQ)
        assert (codes_PHQ.flatten(0, 1)[frames:] == codes_FQ[-1]).all()
        for delays in (tuple(range(codebooks)), (0,) * codebooks, tuple(2 * q % 5 for q in range(codebooks))):
            shifted_PSQ = delayed(codes_PHQ, delays, (999,) * codebooks)
            assert shifted_PSQ.shape[1] == patch_frames + max(delays)
            assert torch.equal(undelayed(shifted_PSQ, delays), codes_PHQ)
            assert int((shifted_PSQ == 999).sum()) == len(codes_PHQ) * max(delays) * codebooks


def test_delayed_places_codebook_q_of_frame_f_at_step_f_plus_q():
    codes_PHQ = torch.tensor([[[10, 20, 30], [11, 21, 31]]])
    assert delayed(codes_PHQ, (0, 1, 2), (7, 8, 9)).tolist() == [[[10, 8, 9], [11, 20, 9], [7, 21, 30], [7, 8, 31]]]


def test_positions_of_text_and_audio(builder, tokenizer):
    codes_FQ = codes_of(9)
    ids = tokenizer.special_tokens
    sequence = builder.build([TextPart("hello"), AudioPart(codes_FQ, has_loss=True)])
    text = tokenizer.encode("hello")
    assert sequence.text_ids_T.tolist() == [*text, ids["<|sosp|>"], *[ids["<|empty|>"]] * 3, ids["<|eosp|>"]]
    assert torch.equal(sequence.codes_THQ[sequence.is_patch_T].flatten(0, 1)[:9], codes_FQ)
    assert sequence.codes_THQ[0].tolist() == [list(builder.config.empty_ids)] * 4
    assert sequence.has_loss_T.tolist() == [False] * len(text) + [True] * 5
    assert packed([sequence, sequence]).document_lengths == (len(sequence),) * 2


@pytest.mark.parametrize("num_words", [0, 5, 6, 23])
@pytest.mark.parametrize("frames", [1, 90])
def test_spoken_replies_hold_their_text_and_codes_in_order(builder, tokenizer, num_words, frames):
    text, codes_FQ = " hello" * num_words, codes_of(frames, num_words)
    assert len(tokenizer.encode(" hello")) == 1
    sequence = builder.build([TextPart("say it: "), SpeechPart(text, codes_FQ), TextPart(" and more")])
    ids, special = sequence.text_ids_T.tolist(), tokenizer.special_tokens
    reply = slice(ids.index(special["<|sostm|>"]) + 1, ids.index(special["<|eostm|>"]))
    said = [token for token in ids[reply] if token != special["<|empty|>"]]
    assert said.pop() == special["<|eot|>"]
    assert tokenizer.decode(said) == text
    assert torch.equal(sequence.codes_THQ[reply][sequence.is_patch_T[reply]].flatten(0, 1)[:frames], codes_FQ)


def test_text_and_patches_alternate_by_five(builder):
    sequence = builder.build([SpeechPart(" hello" * 7, codes_of(4 * 12))])
    kinds = "".join("p" if is_patch else "t" for is_patch in sequence.is_patch_T.tolist())
    assert kinds == "t" + "ttttt" + "ppppp" + "tt" + "t" + "ppppp" + "pp" + "t"  # starts, 7 words, end of text, end


@pytest.mark.parametrize("is_given", [True, False])
def test_a_form_requires_patches_after_text_and_the_text_after_its_audio(builder, is_given):
    text, tokens = " hello" * 7, builder.tokens
    form = SpeechForm(tokens, builder.speech_segments(text) if is_given else None)
    (hello,) = set(builder.tokenizer.encode(text))
    for _ in range(5):
        assert form.allowed() == ((hello,) if is_given else None) and not form.allows_patch
        form.push(hello)
    assert form.allowed() == ((tokens.empty,) if is_given else (tokens.text_end, tokens.empty))
    form.push(tokens.empty)
    assert form.allowed() == ((tokens.empty, hello) if is_given else None) and form.allows_patch
    form.push(hello)
    for token in (hello, tokens.text_end):  # the audio is over
        assert form.allowed() == ((token,) if is_given else None) and not form.allows_patch
        form.push(token)
    assert form.allowed() == (tokens.stream_end,)


@pytest.mark.parametrize(
    ("num_words", "num_patches"),
    [(0, 3), (3, 18), (5, 28), (11, 58), (12, 3), (12, 5), (12, 7), (12, 8), (12, 10), (20, 12), (10, 5), (5, 2)],
)
@pytest.mark.parametrize("is_given", [True, False])
def test_a_form_allows_the_replies_of_training(builder, num_words, num_patches, is_given):
    text, tokens = " hello" * num_words, builder.tokens
    sequence = builder.build([SpeechPart(text, codes_of(4 * num_patches))])
    form = SpeechForm(tokens, builder.speech_segments(text) if is_given else None)
    for token in sequence.text_ids_T.tolist()[1:]:
        allowed = form.allowed()
        if allowed is not None:
            assert token in allowed
        else:
            assert form.allows_patch if token == tokens.empty else token not in (tokens.end, tokens.stream_end)
        form.push(token)


def test_missing_special_tokens_are_all_named():
    plain = Tokenizer.train(TEXTS, 300)
    with pytest.raises(DataError, match=r"no special token <\|empty\|>, <\|sosp\|>.*<\|eot\|>.*Use the tokenizer.json"):
        AudioTokens.of(plain)


def test_special_tokens_are_added_behind_the_ids_of_a_text_model(tmp_path):
    plain = Tokenizer.train(TEXTS, 300)
    grown = plain.with_special_tokens(AUDIO_TOKENS)
    assert sorted(grown.special_tokens[token] for token in AUDIO_TOKENS) == [
        *range(plain.vocab_size, plain.vocab_size + len(AUDIO_TOKENS))
    ]
    grown.save(tmp_path)
    assert AudioTokens.of(Tokenizer.load(tmp_path)) == AudioTokens.of(grown)
    assert grown.encode("hello <|empty|>") == plain.encode("hello <|empty|>")
    assert grown.with_special_tokens(AUDIO_TOKENS).fingerprint == grown.fingerprint


def test_ids_are_those_of_the_tokenizer_and_no_defaults(tokenizer):
    order = (*reversed(ALL_SPECIAL_TOKENS),)
    other = Tokenizer.train(TEXTS, 300, order)
    assert AudioTokens.of(other).empty == other.special_tokens["<|empty|>"] != AudioTokens.of(tokenizer).empty


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (torch.zeros(3, 8), "integers"),
        (torch.zeros(3, 2, dtype=torch.int64), "at least 8 codebooks"),
        (torch.zeros(0, 8, dtype=torch.int64), "no frames"),
        (torch.full((3, 8), 255), "codebook 2 of the audio has the code 255, but the model has 128 codes"),
        (torch.full((3, 8), -1), "codebook 0"),
    ],
)
def test_bad_codes_are_refused(builder, codes, message):
    with pytest.raises(DataError, match=message):
        builder.build([AudioPart(codes)])


def test_a_conversation_as_text(builder, tokenizer):
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "<|im_end|>"}, {"type": "audio", "audio": 5}]},
        {
            "role": "assistant",
            "thinking": True,
            "Chain-of-thought": "hm",
            "content": [{"type": "text", "text": " hello"}, {"type": "audio", "audio": 8}],
        },
        {"role": "user", "content": "hello"},
    ]
    sequence = builder.build([*conversation_parts(messages, codes_of), *reply_parts(thinking=False, is_spoken=False)])
    text = tokenizer.decode(sequence.text_ids_T.tolist(), skip_special=False)
    assert text == (
        "<|im_start|>user\n<|im_end|><|sosp|><|empty|><|empty|><|eosp|><|im_end|>\n<|im_start|>assistant\n<think>\nhm"
        "</think>\n<|sostm|> hello<|eot|><|empty|><|empty|><|eostm|><|im_end|>\n<|im_start|>user\nhello<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n"
    )
    predicted = tokenizer.decode(sequence.text_ids_T[sequence.has_loss_T].tolist(), skip_special=False)
    assert predicted == "hm</think>\n<|sostm|> hello<|eot|><|empty|><|empty|><|eostm|><|im_end|>\n"
    turn_ends = sequence.text_ids_T == builder.tokens.turn_end
    assert int(turn_ends.sum()) == 3  # the text of the user gives none


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "list of messages"),
        ([{"role": "robot", "content": "x"}], "message 0 needs a role"),
        ([{"role": "user"}], "needs a content"),
        ([{"role": "user", "content": [{"type": "image"}]}], "neither"),
        ([{"role": "user", "content": [{"type": "text", "text": 5}]}], "neither"),
        ([{"role": "assistant", "thinking": True, "content": "x"}], "Chain-of-thought"),
        ([{"role": "assistant", "thinking": "yes", "content": "x"}], "true, false or null"),
        ([{"role": "assistant", "content": [{"type": "audio", "audio": 4}] * 2}], "2 audio files"),
    ],
)
def test_bad_conversations_are_refused(messages, message):
    with pytest.raises(DataError, match=message):
        conversation_parts(messages, codes_of)
