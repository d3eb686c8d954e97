//! What the two routes read and refuse, as tables: a body, and the error's field, code and words.

use serde_json::{Value, json};

use super::*;
use crate::{
    http::{Parsed, chat, completions},
    prompt::Source,
};

const PROMPTS_MAX: usize = 3;

/// The body that every case changes.
fn chat_body() -> Value {
    json!({"model": "m", "messages": [{"role": "user", "content": "hello"}]})
}

fn text_body() -> Value {
    json!({"model": "m", "prompt": "hello"})
}

fn with(mut body: Value, changes: &Value) -> Value {
    if let (Some(body), Some(changes)) = (body.as_object_mut(), changes.as_object()) {
        body.extend(changes.clone());
    }
    body
}

fn parse_chat(changes: &Value) -> Result<Parsed, ApiError> {
    chat::parse(with(chat_body(), changes))
}

fn parse_text(changes: &Value) -> Result<Parsed, ApiError> {
    completions::parse(with(text_body(), changes), PROMPTS_MAX)
}

/// Both parsers must refuse `changes` at `param` with `words`.
fn check(route: &str, found: Result<Parsed, ApiError>, changes: &Value, param: &str, words: &str) {
    let Err(error) = found else {
        panic!("{route} accepted {changes}");
    };
    assert_eq!(error.status.as_u16(), 400, "{route} {changes}");
    assert_eq!(
        error.param.as_deref(),
        Some(param),
        "{route} {changes}: {}",
        error.message
    );
    assert!(
        error.message.contains(words),
        "{route} {changes}: {:?} should say {words:?}",
        error.message
    );
}

#[test]
fn both_routes_refuse() {
    let table = [
        (
            json!({"model": 7}),
            "model",
            "model must be a string, and it is a whole number",
        ),
        (
            json!({"max_tokens": 0}),
            "max_tokens",
            "max_tokens is 0, and it must be from 1",
        ),
        (json!({"max_tokens": -1}), "max_tokens", "is -1"),
        (
            json!({"max_tokens": 1.5}),
            "max_tokens",
            "a whole number, and it is a number with a fraction",
        ),
        (
            json!({"max_tokens": "7"}),
            "max_tokens",
            "a whole number, and it is a string",
        ),
        (json!({"max_tokens": 1e30}), "max_tokens", "a whole number"),
        (
            json!({"max_tokens": 18_446_744_073_709_551_615u64}),
            "max_tokens",
            "must be from 1 to 4294967295",
        ),
        (json!({"temperature": 2.1}), "temperature", "must be from 0 to 2"),
        (json!({"temperature": "hot"}), "temperature", "must be a number"),
        (json!({"top_p": 0}), "top_p", "use temperature = 0"),
        (json!({"top_p": 1.01}), "top_p", "must be from 0 to 1"),
        (json!({"seed": 1.5}), "seed", "whole number of 64 bits"),
        (json!({"stop": 7}), "stop", "a string or an array of strings"),
        (json!({"stop": ["a", 7]}), "stop[1]", "must be a string"),
        (json!({"stop": ["1", "2", "3", "4", "5"]}), "stop", "5 texts, at most 4"),
        (json!({"stop": ""}), "stop", "has 0 bytes"),
        (json!({"n": 2}), "n", "not supported"),
        (json!({"n": 0}), "n", "must be from 1"),
        (json!({"stream": "yes"}), "stream", "true or false"),
        (
            json!({"stream_options": {"include_usage": true}}),
            "stream_options",
            "set stream to true",
        ),
        (
            json!({"stream": true, "stream_options": {"include_usages": true}}),
            "stream_options.include_usages",
            "did you mean `stream_options.include_usage`?",
        ),
        (json!({"frequency_penalty": 0.5}), "frequency_penalty", "not supported"),
        (json!({"logit_bias": {"5": 100}}), "logit_bias", "not supported"),
        (json!({"temprature": 1}), "temprature", "did you mean `temperature`?"),
        (json!({"top_k": 1}), "top_k", "there is no field `top_k`"),
        (json!({"xyzzy": 1}), "xyzzy", "leave it out"),
        (json!({"kvasir": 7}), "kvasir", "must be an object"),
        (
            json!({"kvasir": {"attention": "some"}}),
            "kvasir.attention",
            "none of \"full\"",
        ),
        (
            json!({"kvasir": {"atention": "rows"}}),
            "kvasir.atention",
            "did you mean `kvasir.attention`?",
        ),
        (json!({"kvasir": {"target_mass": 0}}), "kvasir.target_mass", "above 0"),
        (
            json!({"kvasir": {"target_mass": 1.5}}),
            "kvasir.target_mass",
            "from 0 to 1",
        ),
        (json!({"kvasir": {"k": 0}}), "kvasir.k", "must be from 1"),
        (json!({"kvasir": {"sink": -1}}), "kvasir.sink", "must be from 0"),
        (
            json!({"kvasir": {"cache_salt": "x".repeat(257)}}),
            "kvasir.cache_salt",
            "257 bytes",
        ),
    ];
    for (changes, param, words) in table {
        check("chat", parse_chat(&changes), &changes, param, words);
        check("text", parse_text(&changes), &changes, param, words);
    }
}

#[test]
fn chat_refuses() {
    let message = |message: Value| json!({"messages": [message]});
    let table = [
        (json!({"messages": null}), "messages", "messages is missing"),
        (json!({"messages": []}), "messages", "messages is empty"),
        (
            json!({"messages": "hello"}),
            "messages",
            "must be an array, and it is a string",
        ),
        (message(json!("hello")), "messages[0]", "must be an object"),
        (message(json!({"content": "a"})), "messages[0].role", "is missing"),
        (
            message(json!({"role": "wizard", "content": "a"})),
            "messages[0].role",
            "none of \"system\"",
        ),
        (
            message(json!({"role": "tool", "content": "a"})),
            "messages[0].role",
            "no tools",
        ),
        (message(json!({"role": "user"})), "messages[0].content", "is missing"),
        (
            message(json!({"role": "user", "content": 7})),
            "messages[0].content",
            "a string or an array of parts",
        ),
        (
            message(json!({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]})),
            "messages[0].content[0].type",
            "text only",
        ),
        (
            message(json!({"role": "user", "content": [{"type": "text"}]})),
            "messages[0].content[0].text",
            "is missing",
        ),
        (
            message(json!({"role": "user", "content": "a", "contents": "b"})),
            "messages[0].contents",
            "did you mean `messages[0].content`?",
        ),
        (
            message(json!({"role": "assistant", "content": "a", "tool_calls": [{"id": "1"}]})),
            "messages[0].tool_calls",
            "not supported",
        ),
        (json!({"tools": [{"type": "function"}]}), "tools", "not supported"),
        (json!({"tool_choice": "required"}), "tool_choice", "not supported"),
        (json!({"logprobs": true}), "logprobs", "not supported"),
        (
            json!({"response_format": {"type": "json_object"}}),
            "response_format",
            "not supported",
        ),
        (json!({"store": true}), "store", "not supported"),
        (json!({"modalities": ["text", "audio"]}), "modalities", "not supported"),
        (
            json!({"max_tokens": 5, "max_completion_tokens": 6}),
            "max_tokens",
            "differ",
        ),
        (json!({"prompt": "hello"}), "prompt", "there is no field `prompt`"),
    ];
    for (changes, param, words) in table {
        check("chat", parse_chat(&changes), &changes, param, words);
    }
}

#[test]
fn completions_refuse() {
    let table = [
        (json!({"prompt": null}), "prompt", "prompt is missing"),
        (json!({"prompt": []}), "prompt", "prompt is empty"),
        (json!({"prompt": 7}), "prompt", "a string, an array of strings"),
        (
            json!({"prompt": ["a", 7]}),
            "prompt[1]",
            "a string or an array of token ids",
        ),
        (json!({"prompt": [1, -2]}), "prompt[1]", "a token id"),
        (json!({"prompt": [1, "a"]}), "prompt[1]", "a token id"),
        (json!({"prompt": [[1], [2.5]]}), "prompt[1][0]", "a token id"),
        (
            json!({"prompt": ["a", "b", "c", "d"]}),
            "prompt",
            "4 prompts, at most 3",
        ),
        (json!({"echo": true}), "echo", "not supported"),
        (json!({"best_of": 2}), "best_of", "not supported"),
        (json!({"logprobs": 3}), "logprobs", "not supported"),
        (json!({"suffix": "x"}), "suffix", "not supported"),
        (json!({"messages": []}), "messages", "there is no field `messages`"),
    ];
    for (changes, param, words) in table {
        check("text", parse_text(&changes), &changes, param, words);
    }
}

#[test]
fn a_request_that_is_no_object() {
    for body in [json!([]), json!("hello"), json!(null), json!(7)] {
        let Err(error) = chat::parse(body.clone()) else {
            panic!("accepted {body}");
        };
        assert!(
            error.message.contains("send a JSON object"),
            "{body}: {}",
            error.message
        );
    }
}

/// What the official client may send without changing the answer.
#[test]
fn harmless_fields_are_accepted() {
    let both = [
        json!({}),
        json!({"n": 1, "user": "u", "seed": -1, "stop": null, "logit_bias": {}, "presence_penalty": 0}),
        json!({"stream": true, "stream_options": {"include_usage": true, "include_obfuscation": false}}),
        json!({"temperature": 0, "top_p": 1, "max_tokens": 1, "stop": ["a", "b", "c", "d"]}),
        json!({"kvasir": {}}),
        json!({"kvasir": null, "logprobs": null}),
    ];
    for changes in both {
        for (route, found) in [("chat", parse_chat(&changes)), ("text", parse_text(&changes))] {
            assert!(found.is_ok(), "{route} {changes}: {:?}", found.err());
        }
    }
    let chat = [
        json!({"metadata": {"a": "b"}, "store": false, "service_tier": "auto", "safety_identifier": "x"}),
        json!({"tools": [], "tool_choice": "none", "parallel_tool_calls": true, "response_format": {"type": "text"}}),
        json!({"logprobs": false, "modalities": ["text"], "prompt_cache_key": "k", "verbosity": "low"}),
        // An answer as the client library gives it back.
        json!({"messages": [{"role": "assistant", "content": "a", "refusal": null, "annotations": [], "audio": null,
            "function_call": null, "tool_calls": null, "name": "n"}]}),
    ];
    for changes in chat {
        let found = parse_chat(&changes);
        assert!(found.is_ok(), "{changes}: {:?}", found.err());
    }
}

#[test]
fn what_was_asked_is_what_is_done() {
    let parsed = parse_chat(&json!({
        "messages": [
            {"role": "developer", "content": "be brief"},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        ],
        "max_completion_tokens": 5, "temperature": 0.5, "top_p": 0.25, "seed": -1, "stop": "END",
        "stream": true, "stream_options": {"include_usage": true},
        "kvasir": {"attention": "attend", "k": 64, "target_mass": 0.5, "sink": 0, "window": 7, "index": "sketch",
            "tail": false, "certificate": "statistical", "missed_mass_max": 0.25, "effort": 0.125, "cache_salt": "s",
            "no_cache": true, "ignore_eos": true},
    }))
    .expect("good");
    let [Source::Chat(messages)] = &parsed.sources[..] else {
        panic!("one chat");
    };
    let messages: Vec<(&str, &str)> = messages.iter().map(|m| (m.role.as_str(), m.content.as_str())).collect();
    assert_eq!(messages, [("system", "be brief"), ("user", "a\nb")]);
    assert_eq!(parsed.budget, Budget::Asked(5));
    assert!(parsed.stream && parsed.include_usage);
    let options = parsed.options;
    assert_eq!(
        (options.temperature, options.top_p, options.seed),
        (0.5, 0.25, Some(u64::MAX))
    );
    assert_eq!(options.stop, ["END"]);
    assert_eq!(
        (options.cache_salt.as_str(), options.no_cache, options.ignore_eos),
        ("s", true, true)
    );
    let attention = Attention {
        mode: Some(AttentionMode::Attend),
        k: Some(64),
        target_mass: Some(0.5),
        sink: Some(0),
        window: Some(7),
        index: Some("sketch"),
        tail: Some(false),
        certificate: Some("statistical"),
        missed_mass_max: Some(0.25),
        effort: Some(0.125),
    };
    assert_eq!(options.attention, attention);
}

#[test]
fn the_four_forms_of_a_prompt() {
    let table = [
        (json!("a"), "text"),
        (json!(["a", "b"]), "text text"),
        (json!([1, 2]), "2 ids"),
        (json!([[1, 2], [3], "c"]), "2 ids 1 ids text"),
    ];
    for (prompt, expected) in table {
        let parsed = parse_text(&json!({"prompt": prompt})).expect("good");
        let forms = parsed.sources.iter().map(|source| match source {
            Source::Text(_) => "text".to_owned(),
            Source::Tokens(ids) => format!("{} ids", ids.len()),
            Source::Chat(_) => "chat".to_owned(),
        });
        assert_eq!(forms.collect::<Vec<_>>().join(" "), expected, "{prompt}");
        assert_eq!(parsed.budget, Budget::AtMost(16), "OpenAI's default");
    }
}
