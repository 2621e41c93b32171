import pytest

from hico_model.errors import UserError
from hico_model.prompt import (
    Tokenizer,
    chat_prompt,
    check_question,
    load_tokenizer,
    long_time_message,
    nano_tokenizer,
    time_message,
    tokenize,
)


def test_the_prompt_is_the_official_one_to_the_byte():
    assert chat_prompt("What is shown?", time_message(12.3456, 64)) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<image>\n"
        "The video lasts for 12.35 seconds, and 64 frames are uniformly sampled from it. "
        "What is shown?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_the_long_message_lists_the_time_of_each_frame():
    assert long_time_message(10, [0.04, 3.26, 7]) == (
        "The video lasts for 10.00 seconds, and 3 frames are uniformly sampled "
        "at 0.0, 3.3, 7.0 seconds."
    )


def test_text_is_split_around_the_video_and_nothing_is_lost():
    t = nano_tokenizer()
    prompt = chat_prompt("Why?", "M.")
    before, after = tokenize(t, prompt)
    start, end = prompt.split("<image>")
    assert before == t.encode(start)
    assert after == t.encode(end)
    assert t.decode(before) == "system\nYou are a helpful assistant.\nuser\n"
    assert t.decode(after) == "\nM. Why?\nassistant\n"


def test_a_question_may_contain_the_placeholder_and_braces():
    prompt = chat_prompt("Where is {content} in <image>?", "M.")
    before, after = tokenize(nano_tokenizer(), prompt)
    assert nano_tokenizer().decode(before).endswith("user\n")
    assert "Where is {content} in <image>?" in nano_tokenizer().decode(after)


@pytest.mark.parametrize(
    "text", ["hello", "", "\n", " a  b ", "é, ü, 漢字, \N{GRINNING FACE}", "\x00\x7f\t", "x" * 5000]
)
def test_bytes_go_through_the_nano_tokenizer_and_back(text):
    t = nano_tokenizer()
    ids = t.encode(text)
    assert len(ids) == len(text.encode())
    assert t.decode(ids) == text


def test_all_nano_ids_fit_the_vocabulary_of_the_nano_model():
    t = nano_tokenizer()
    ids = t.encode("".join(map(chr, range(0x800))) + "<|im_start|><|im_end|><|endoftext|>")
    assert max(ids) < 512
    assert len(t.encode("<|im_end|>")) == 1


def test_an_answer_ends_at_the_first_end_token():
    t = nano_tokenizer()
    for end in ("<|im_end|>", "<|endoftext|>"):
        assert t.answer(t.encode(f" A dog.\n{end}\n<|im_start|>user")) == "A dog."
        assert t.encode(end)[0] in t.eos_ids
    assert t.answer(t.encode("no end yet ")) == "no end yet"
    assert t.answer([]) == ""


def test_a_checkpoint_tokenizer_is_read_from_its_folder(tmp_path):
    t = nano_tokenizer()
    t._tokenizer.save(str(tmp_path / "tokenizer.json"))
    other = load_tokenizer(tmp_path)
    text = chat_prompt("Ça va?", "M.")
    assert other.encode(text) == t.encode(text)
    assert other.eos_ids == t.eos_ids


def test_a_folder_with_vocabulary_and_merges_will_do(tmp_path):
    pytest.importorskip("transformers")
    import json

    vocab = json.loads(nano_tokenizer()._tokenizer.to_str())["model"]["vocab"]
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "Qwen2Tokenizer",
                "added_tokens_decoder": {
                    str(256 + i): {"content": token, "special": True}
                    for i, token in enumerate(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
                },
            }
        )
    )
    t = load_tokenizer(tmp_path)
    ids = t.encode("<|im_start|>user\nhi<|im_end|>")
    assert t.decode(ids) == "user\nhi"
    assert ids[-1] in t.eos_ids


@pytest.mark.parametrize("cut", [0, 1, 1000])
def test_a_damaged_tokenizer_is_named(tmp_path, cut):
    file = tmp_path / "tokenizer.json"
    file.write_text(nano_tokenizer()._tokenizer.to_str()[:cut])
    with pytest.raises(UserError, match=r"tokenizer\.json is damaged: download it again$"):
        load_tokenizer(tmp_path)


def test_a_question_must_be_text():
    check_question("Ça va, \ud7ff\ue000 \N{GRINNING FACE}?")
    with pytest.raises(UserError, match="the question is not UTF-8 after 'Ça': type it again"):
        check_question("Ça\udcff?")


def test_a_folder_without_a_tokenizer_is_named(tmp_path):
    with pytest.raises(UserError, match=r"no tokenizer in .*copy tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_without_chat_tokens_is_refused():
    import tokenizers

    with pytest.raises(UserError, match=r"lacks <\|im_end\|>"):
        Tokenizer(tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0}, [])))
