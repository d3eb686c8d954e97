use serde_json::json;

use super::*;

fn end(reason: FinishReason, prompt_tokens: u32, completion_tokens: u32, cached_tokens: u32) -> End {
    End {
        reason,
        prompt_tokens,
        completion_tokens,
        report: KvasirReport::example(cached_tokens),
    }
}

/// The JSON without what differs from run to run; the id's prefix stays.
fn read(text: &str) -> Value {
    let mut value: Value = serde_json::from_str(text).expect("JSON");
    let object = value.as_object_mut().expect("an object");
    let id = object.remove("id").expect("an id");
    let prefix = id
        .as_str()
        .and_then(|id| id.split('-').next())
        .expect("a prefix")
        .to_owned();
    object.insert("id".to_owned(), prefix.into());
    assert!(
        object
            .remove("created")
            .is_some_and(|created| created.as_u64() > Some(1_700_000_000))
    );
    value
}

fn usage(prompt: u32, completion: u32, cached: u32) -> Value {
    json!({
        "prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached, "audio_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": 0, "audio_tokens": 0, "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0},
    })
}

fn report(cached: u32) -> Value {
    serde_json::to_value(KvasirReport::example(cached)).expect("JSON")
}

#[test]
fn a_whole_chat_answer() {
    let reply = Reply::new(Shape::Chat, "m", "fp_1", false, 1);
    let text = reply.whole(&[("hi".to_owned(), end(FinishReason::Stop, 7, 2, 4))]);
    let expected = json!({
        "id": "chatcmpl", "object": "chat.completion", "model": "m", "system_fingerprint": "fp_1",
        "choices": [{
            "index": 0,
            "message": {"role": "assistant", "content": "hi", "refusal": null, "annotations": []},
            "logprobs": null, "finish_reason": "stop",
        }],
        "usage": usage(7, 2, 4),
        "kvasir": report(4),
    });
    assert_eq!(read(&text), expected);
}

#[test]
fn whole_answers_to_two_prompts() {
    let reply = Reply::new(Shape::Text, "m", "fp_1", false, 2);
    let answers = [
        ("a".to_owned(), end(FinishReason::Stop, 7, 2, 4)),
        ("b".to_owned(), end(FinishReason::Length, 3, 5, 0)),
    ];
    let choice = |index, text, reason, cached| json!({"index": index, "text": text, "logprobs": null, "finish_reason": reason, "kvasir": report(cached)});
    let expected = json!({
        "id": "cmpl", "object": "text_completion", "model": "m", "system_fingerprint": "fp_1",
        "choices": [choice(0, "a", "stop", 4), choice(1, "b", "length", 0)],
        "usage": usage(10, 7, 4),
    });
    assert_eq!(read(&reply.whole(&answers)), expected);
}

#[test]
fn the_pieces_of_a_chat_stream() {
    let piece = |choices: Value| {
        json!({"id": "chatcmpl", "object": "chat.completion.chunk", "model": "m", "system_fingerprint": "fp_1",
            "choices": choices})
    };
    let choice =
        |delta: Value, reason: Value| json!([{"index": 0, "delta": delta, "logprobs": null, "finish_reason": reason}]);
    let put = |mut value: Value, field: &str, what: Value| {
        value[field] = what;
        value
    };
    let opening = piece(choice(json!({"role": "assistant", "content": ""}), Value::Null));
    let text = piece(choice(json!({"content": "hi"}), Value::Null));
    let last = piece(choice(json!({}), "length".into()));
    let done = end(FinishReason::Length, 7, 2, 4);

    let plain = Reply::new(Shape::Chat, "m", "fp_1", false, 1);
    assert_eq!(read(&plain.opening(0).expect("chat streams name the speaker")), opening);
    assert_eq!(read(&plain.text(0, "hi")), text);
    assert_eq!(read(&plain.end(0, &done)), put(last.clone(), "kvasir", report(4)));
    assert_eq!(plain.usage(std::slice::from_ref(&done)), None);

    let counted = Reply::new(Shape::Chat, "m", "fp_1", true, 1);
    assert_eq!(read(&counted.text(0, "hi")), put(text, "usage", Value::Null));
    assert_eq!(read(&counted.end(0, &done)), put(last, "usage", Value::Null));
    let closing = put(put(piece(json!([])), "usage", usage(7, 2, 4)), "kvasir", report(4));
    assert_eq!(read(&counted.usage(&[done]).expect("asked for")), closing);
}

#[test]
fn the_pieces_of_a_text_stream() {
    let reply = Reply::new(Shape::Text, "m", "fp_1", false, 2);
    assert_eq!(reply.opening(0), None);
    let expected = json!({"id": "cmpl", "object": "text_completion", "model": "m", "system_fingerprint": "fp_1",
        "choices": [{"index": 1, "text": "hi", "logprobs": null, "finish_reason": null}]});
    assert_eq!(read(&reply.text(1, "hi")), expected);
    let last: Value = read(&reply.end(1, &end(FinishReason::Stop, 7, 2, 4)));
    assert_eq!(
        last["choices"][0]["kvasir"],
        report(4),
        "each choice has its own where there are several"
    );
    assert_eq!(last.get("kvasir"), None);
}

#[test]
fn the_report_has_every_name() {
    let value = report(4);
    let names = [
        "worker",
        "cached_tokens",
        "cached_tokens_device",
        "cached_tokens_store",
        "ttft_ms",
        "attention",
        "fell_back",
        "reason",
        "bytes_pushed",
        "bytes_loaded",
        "keys_scanned",
        "keys_total",
        "keys_attended",
        "mass_covered_p50",
        "mass_covered_min",
        "index",
        "index_reason",
        "missed_mass_bound_p50",
        "missed_mass_bound_max",
        "escalations",
        "hinted",
        "search_ms",
        "store_queued_ms",
        "waited_ms",
        "search_hidden",
        "wire_us_p50",
        "rows",
        "rows_kept",
        "retrieved_bytes",
        "round_trips",
        "queue_ms",
        "prefill_ms",
        "decode_ms",
    ];
    let found: std::collections::BTreeSet<&str> = value
        .as_object()
        .expect("an object")
        .keys()
        .map(String::as_str)
        .collect();
    assert_eq!(found, names.into_iter().collect());
}
