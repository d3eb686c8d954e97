//! Text to ids and back with SmolLM2's vocabulary.

use std::sync::Arc;

use kvasir_model::{ChatMessage, Tokenizer};
use rand::{Rng, SeedableRng, rngs::StdRng};

use crate::{
    made_up::{Gguf, Value},
    smollm,
};

fn decode(tokenizer: &Arc<Tokenizer>, ids: &[u32]) -> String {
    let mut decoder = tokenizer.decoder();
    let text: String = ids.iter().map(|id| decoder.push(*id)).collect();
    text + &decoder.finish()
}

#[test]
fn texts_come_back_as_they_were() {
    let tokenizer = smollm::file().tokenizer();
    let table = [
        "",
        "The",
        " The",
        "The capital of France is Paris.",
        "  two  spaces   three",
        "\n\n\ttabs\r\nand line ends\n",
        "1234567890 3.14159 2026-01-02",
        "日本語のテキスト、句読点。",
        "Ünïcödé ñ ß æ ø å é",
        "😀🎉👩‍👩‍👧 \u{200d}\u{feff}",
        "it's we'll I'd they've",
        "fn main() { let x = a[i] << 2; }",
        "<|im_start|>not special<|im_end|>",
        "\u{0}\u{1}\u{7f}\u{a0}\u{ad}",
    ];
    for text in table {
        let ids = tokenizer.encode(text, false).expect("any text");
        assert_eq!(decode(tokenizer, &ids), text);
        assert!(
            ids.iter().all(|id| !tokenizer.is_control(*id)),
            "{text:?} must not become a control token"
        );
    }
}

#[test]
fn random_texts_come_back_as_they_were() {
    let tokenizer = smollm::file().tokenizer();
    let mut rng = StdRng::seed_from_u64(11);
    for case in 0..200 {
        let len = rng.random_range(0..60);
        // Up to U+3FFFF: beyond it SmolLM2 has no token for the first byte, and below U+0020 it lacks six.
        let text: String = (0..len)
            .map(|_| match rng.random_range(0..4) {
                0 => rng.random_range(' '..='~'),
                1 => rng.random_range('\u{a0}'..'\u{800}'),
                2 => rng.random_range('\u{800}'..'\u{ffff}'),
                _ => rng.random_range('\u{10000}'..'\u{40000}'),
            })
            .collect();
        let ids = tokenizer.encode(&text, false).expect("any text");
        assert_eq!(decode(tokenizer, &ids), text, "case {case}");
    }
}

#[test]
fn known_ids() {
    let tokenizer = smollm::file().tokenizer();
    let ids = |text, special| tokenizer.encode(text, special).expect("any text");
    // No space is put before the first word.
    assert_ne!(ids("The", true), ids(" The", true));
    assert_eq!(ids("The", true).len(), 1);
    // Digits stand alone.
    assert_eq!(ids("2026", true).len(), 4);
    assert_eq!(ids("<|im_start|>", true), [1]);
    assert!(ids("<|im_start|>", false).len() > 1);
    assert_eq!(
        ids("a<|im_end|>b", true),
        [ids("a", true), vec![2], ids("b", true)].concat()
    );
    assert_eq!(tokenizer.stops(), [0, 2]);
    assert_eq!(
        (tokenizer.vocab(), tokenizer.bos(), tokenizer.eos()),
        (49152, Some(1), Some(2))
    );
    // A byte without a token is left out rather than becoming a control token.
    assert_eq!(ids("a\u{4}b", true), [ids("a", true), ids("b", true)].concat());
}

#[test]
fn control_tokens_and_unknown_ids_have_no_text() {
    let tokenizer = smollm::file().tokenizer();
    let hello = tokenizer.encode("hello", false).expect("any text");
    let ids = [&[1][..], &hello[..], &[2, 0, u32::MAX, 49152]].concat();
    assert_eq!(decode(tokenizer, &ids), "hello");
}

#[test]
fn a_code_point_is_given_out_whole() {
    let tokenizer = smollm::file().tokenizer();
    let ids = tokenizer.encode("a🦀\u{1F9FF}b", false).expect("any text");
    let mut decoder = tokenizer.decoder();
    let parts: Vec<String> = ids.iter().map(|id| decoder.push(*id)).collect();
    assert!(
        parts.iter().any(String::is_empty),
        "the emoji takes several tokens: {parts:?}"
    );
    assert!(parts.iter().all(|part| !part.contains('\u{fffd}')), "{parts:?}");
    assert_eq!(parts.concat(), "a🦀\u{1F9FF}b");
    // Cut in the middle, what is left is replaced.
    let mut decoder = tokenizer.decoder();
    let cut: String = ids[..2].iter().map(|id| decoder.push(*id)).collect();
    assert_eq!(cut + &decoder.finish(), "a\u{fffd}");
}

#[test]
fn the_first_token_is_put_once() {
    let mut gguf = Gguf::small();
    gguf.set("tokenizer.ggml.bos_token_id", Value::U32(0));
    gguf.set("tokenizer.ggml.add_bos_token", Value::Bool(true));
    let file = gguf.open().expect("a sound file");
    let ids = |text| file.tokenizer().encode(text, true).expect("any text");
    assert_eq!(ids(""), [0]);
    assert_eq!(ids("ab")[..], [0, 258]);
    assert_eq!(ids("<|start|>ab")[..], [0, 258]);
    assert_eq!(ids("<|start|><|start|>")[..], [0, 0]);
    assert_eq!(ids("a<|start|>")[2], 0);
}

#[test]
fn the_chat_template_is_the_files() {
    let template = smollm::file().template().expect("an instruct model has one");
    let message = |role: &str, content: &str| ChatMessage {
        role: role.to_owned(),
        content: content.to_owned(),
    };
    assert_eq!(
        template
            .render(&[message("user", "Hi")], true)
            .expect("a plain conversation"),
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n\
         <|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    );
    assert_eq!(
        template
            .render(&[message("system", "S"), message("user", "Hi")], false)
            .expect("a plain conversation"),
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    );
}
