//! Bad input over every door: each time a clear error that says what to do, nothing lost, nothing crashed.

use std::time::Duration;

use anyhow::Result;
use kvasir_block::Tenant;
use kvasir_client::{ClientConfig, StoreClient};
use kvasir_integration::prompt;
use kvasir_proto::v1::{
    AttentionMode, AttentionOptions, BlockBatch, BlockEntry, GenerateRequest, GetBlocksRequest, MatchPrefixRequest,
    OpenNamespaceRequest, PutBlocksRequest, SamplingParams, block_store_client::BlockStoreClient,
};
use kvasir_testkit::{Blocks, Cluster, Options, RawAnswer, generate, request, send_raw, small_schema};
use serde_json::{Value, json};
use tonic::Code;

#[tokio::test(flavor = "multi_thread")]
async fn bad_requests_are_refused_and_the_next_good_one_is_served() -> Result<()> {
    let cluster = Cluster::start(Options::default()).await?;
    over_http(&cluster).await?;
    to_a_worker(&cluster).await?;
    to_the_store(&cluster).await?;
    as_raw_bytes(&cluster).await?;
    let good = cluster
        .chat(json!({"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}))
        .await?;
    assert_eq!(good.status, 200, "{good:?}");
    cluster.stop().await
}

async fn over_http(cluster: &Cluster) -> Result<()> {
    let chat = "/v1/chat/completions";
    let hello = json!([{"role": "user", "content": "Hello"}]);
    let with = |change: Value| {
        let mut body = json!({"model": cluster.file().name(), "messages": hello});
        if let (Some(body), Value::Object(change)) = (body.as_object_mut(), change) {
            body.extend(change);
        }
        body.to_string()
    };
    let secret = "the-secret-of-this-prompt";
    let long = json!([{"role": "user", "content": format!("{secret} ").repeat(9000)}]);
    let huge = format!(
        "{{\"model\": \"{}\", \"messages\": \"{}\"}}",
        cluster.file().name(),
        "x".repeat(5 << 20)
    );
    // Path, body, status, and what the message must name.
    let table: Vec<(&str, String, u16, Vec<&str>)> = vec![
        (chat, "{\"model\": ".to_owned(), 400, vec!["JSON", "line 1"]),
        (chat, String::new(), 400, vec!["JSON"]),
        (chat, "[]".to_owned(), 400, vec!["object"]),
        (chat, "{}".to_owned(), 400, vec!["messages"]),
        (chat, with(json!({"messages": []})), 400, vec!["messages"]),
        (chat, with(json!({"messages": "hello"})), 400, vec!["messages"]),
        (
            chat,
            with(json!({"messages": [{"role": "wizard", "content": "x"}]})),
            400,
            vec!["role"],
        ),
        (
            chat,
            with(json!({"max_token": 3})),
            400,
            vec!["max_token", "max_tokens"],
        ),
        (chat, with(json!({"max_tokens": 0})), 400, vec!["max_tokens"]),
        (chat, with(json!({"max_tokens": "many"})), 400, vec!["max_tokens"]),
        (chat, with(json!({"temperature": "hot"})), 400, vec!["temperature"]),
        (chat, with(json!({"top_p": 0})), 400, vec!["top_p"]),
        (chat, with(json!({"n": 2})), 400, vec!["n "]),
        (
            chat,
            with(json!({"stop": ["a", "b", "c", "d", "e"]})),
            400,
            vec!["stop"],
        ),
        (
            chat,
            with(json!({"kvasir": {"attention": "none"}})),
            400,
            vec!["kvasir.attention", "attend"],
        ),
        (
            chat,
            with(json!({"kvasir": {"atention": "full"}})),
            400,
            vec!["atention", "attention"],
        ),
        (
            chat,
            with(json!({"kvasir": {"target_mass": 2}})),
            400,
            vec!["target_mass"],
        ),
        (
            chat,
            with(json!({"model": "gpt-4o"})),
            404,
            vec!["gpt-4o", cluster.file().name()],
        ),
        (chat, with(json!({"messages": long})), 400, vec!["8192"]),
        (chat, huge, 413, vec!["router.body_bytes_max"]),
        ("/v1/completions", "{\"model\": 7}".to_owned(), 400, vec!["model"]),
        ("/v1/embeddings", "{}".to_owned(), 404, vec!["/v1/embeddings"]),
    ];
    let mut wrong = Vec::new();
    for (path, body, status, named) in table {
        let shown: String = body.chars().take(120).collect();
        let answer = cluster.post(path, &body).await?;
        let good = answer.status == status
            && answer.body["error"]["type"].is_string()
            && named.iter().all(|name| answer.error().contains(name))
            && answer.request_id.is_some();
        if !good {
            wrong.push(format!(
                "{path} {shown}: should be {status} and name {named:?}, is {answer:?}"
            ));
        }
        assert!(!answer.error().contains(secret), "an error must not repeat a prompt");
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    Ok(())
}

async fn to_a_worker(cluster: &Cluster) -> Result<()> {
    let window = cluster.file().shape().context_tokens_max;
    let vocab = cluster.file().shape().vocab as u32;
    let short = prompt(cluster.file(), 10);
    let sampled = |change: fn(&mut SamplingParams)| {
        let mut request = request(&short, 4);
        change(request.sampling.get_or_insert_default());
        request
    };
    let attending = |change: fn(&mut AttentionOptions)| {
        let mut options = AttentionOptions::default();
        options.set_mode(AttentionMode::Attend);
        change(&mut options);
        GenerateRequest {
            attention: Some(options),
            ..request(&short, 4)
        }
    };
    let window_text = window.to_string();
    let table = [
        ("no prompt", request(&[], 4), vec!["prompt"]),
        (
            "longer than the window",
            request(&vec![1; window + 1], 4),
            vec![window_text.as_str()],
        ),
        ("no such token", request(&[vocab], 4), vec!["prompt"]),
        (
            "temperature",
            sampled(|sampling| sampling.temperature = f32::NAN),
            vec!["temperature"],
        ),
        ("top_p", sampled(|sampling| sampling.top_p = 1.5), vec!["top_p"]),
        (
            "target_mass",
            attending(|options| options.target_mass = -1.0),
            vec!["target_mass"],
        ),
        ("mode", attending(|options| options.mode = 77), vec!["mode"]),
    ];
    let mut wrong = Vec::new();
    for (name, bad, named) in table {
        let said = match generate(&cluster.worker_url(0), bad).await {
            Ok(_) => "it was taken".to_owned(),
            Err(error) => match error.downcast_ref::<tonic::Status>() {
                Some(status) if status.code() == Code::InvalidArgument => status.message().to_owned(),
                _ => format!("another error: {error:#}"),
            },
        };
        if said.starts_with("another error") || !named.iter().all(|word| said.contains(word)) {
            wrong.push(format!("{name}: should name {named:?}, is {said:?}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    Ok(())
}

async fn to_the_store(cluster: &Cluster) -> Result<()> {
    let mut raw = BlockStoreClient::connect(cluster.store_url())
        .await?
        .max_encoding_message_size(64 << 20);
    let schema = small_schema();
    let client = StoreClient::new(ClientConfig::to(cluster.store_url()))?;
    let namespace = client
        .open_namespace(&Tenant::new("tests").expect("a name"), &schema)
        .await?;
    let blocks = Blocks::random(7, &schema, 3);
    let good = blocks.layer_blocks[0].clone();

    let mut wrong_shape = OpenNamespaceRequest {
        tenant: "tests".to_owned(),
        schema: Some((&schema).into()),
        ..Default::default()
    };
    wrong_shape.schema.get_or_insert_default().head_dim = 0;
    let status = raw.open_namespace(wrong_shape).await.expect_err("no head dim");
    assert_eq!(status.code(), Code::InvalidArgument);
    assert!(status.message().contains("head_dim"), "{status}");
    let status = raw
        .open_namespace(OpenNamespaceRequest {
            tenant: "tests".to_owned(),
            ..Default::default()
        })
        .await;
    assert!(status.expect_err("no schema").message().contains("schema"));
    let expected = OpenNamespaceRequest {
        tenant: "tests".to_owned(),
        schema: Some((&schema).into()),
        expected_namespace: vec![9; 32].into(),
        ..OpenNamespaceRequest::default()
    };
    assert_eq!(
        raw.open_namespace(expected)
            .await
            .expect_err("another namespace")
            .code(),
        Code::FailedPrecondition
    );

    let short_hash = MatchPrefixRequest {
        namespace: namespace.id.as_bytes().to_vec().into(),
        hashes: vec![vec![1; 31].into()],
        lease_ms: 0,
    };
    let status = raw.match_prefix(short_hash).await.expect_err("31 bytes");
    assert!(status.message().contains("hashes[0]"), "{status}");
    let unknown = MatchPrefixRequest {
        namespace: vec![3; 32].into(),
        ..Default::default()
    };
    assert_eq!(
        raw.match_prefix(unknown).await.expect_err("no such namespace").code(),
        Code::NotFound
    );
    let layers = GetBlocksRequest {
        namespace: namespace.id.as_bytes().to_vec().into(),
        hashes: vec![good.hash.as_bytes().to_vec().into()],
        layer_start: 1,
        layer_end: 9,
        ..GetBlocksRequest::default()
    };
    let status = raw
        .get_blocks(layers)
        .await
        .expect_err("layers that the schema does not have");
    assert_eq!(status.code(), Code::InvalidArgument, "{status}");

    let put = |change: fn(&mut BlockEntry, &mut Vec<u8>)| {
        let mut entry = BlockEntry {
            hash: good.hash.as_bytes().to_vec().into(),
            layer: 0,
            length: good.payload.len() as u32,
            crc32c: good.checksum.to_u32(),
            outcome: 0,
        };
        let mut payload = good.payload.to_vec();
        change(&mut entry, &mut payload);
        PutBlocksRequest {
            header: Some(BlockBatch {
                namespace: namespace.id.as_bytes().to_vec().into(),
                entries: vec![entry],
            }),
            payload: payload.into(),
        }
    };
    let table = [
        ("wrong layer", put(|entry, _| entry.layer = 5), vec!["layer"]),
        (
            "wrong length",
            put(|entry, payload| {
                entry.length -= 2;
                payload.truncate(payload.len() - 2);
            }),
            vec!["length"],
        ),
        (
            "payload too short",
            put(|_, payload| payload.truncate(10)),
            vec!["payload"],
        ),
        (
            "short hash",
            put(|entry, _| entry.hash = vec![1; 8].into()),
            vec!["hash"],
        ),
        ("oversized", put(|_, payload| payload.resize(32 << 20, 0)), vec![]),
    ];
    let mut wrong = Vec::new();
    for (name, bad, named) in table {
        let status = match raw.put_blocks(futures::stream::iter([bad])).await {
            Err(status) => status,
            Ok(reply) => match reply.into_inner().message().await {
                Err(status) => status,
                Ok(outcomes) => tonic::Status::ok(format!("it was taken: {outcomes:?}")),
            },
        };
        let refused = matches!(
            status.code(),
            Code::InvalidArgument | Code::ResourceExhausted | Code::OutOfRange
        );
        if !refused || !named.iter().all(|word| status.message().contains(word)) {
            wrong.push(format!("{name}: should name {named:?}, is {status}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));

    // A stream that ends early: what was answered is kept.
    let mut stream = client.put_blocks(&namespace).await?;
    for block in &blocks.layer_blocks[..4] {
        stream.put(block.clone()).await?;
    }
    stream.flush().await?;
    let mut answered = 0;
    while answered < 4 {
        answered += stream.outcomes().len();
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    drop(stream);
    assert_eq!(
        client.match_prefix(namespace.id, &blocks.chain, None).await?.hit_blocks,
        1,
        "one block has both layers"
    );
    let mut got = client
        .get_blocks(&namespace, &blocks.chain[..1], 0..2, None, None)
        .await?;
    while let Some(block) = got.next().await? {
        let put = blocks
            .layer_blocks
            .iter()
            .find(|put| (put.hash, put.layer) == (block.hash, block.layer));
        assert_eq!(
            block.payload,
            put.map(|put| put.payload.clone()),
            "layer {}",
            block.layer
        );
    }
    Ok(())
}

/// Garbage, half a request, and a closed half: the port answers or closes, and serves the next one.
async fn as_raw_bytes(cluster: &Cluster) -> Result<()> {
    const PATIENCE: Duration = Duration::from_secs(2);
    let http: std::net::SocketAddr = cluster.router_url().trim_start_matches("http://").parse()?;
    let worker: std::net::SocketAddr = cluster.worker_url(0).trim_start_matches("http://").parse()?;
    let garbage: Vec<u8> = (0..4096u32)
        .map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8)
        .collect();
    let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
    let mut oversized_frame = preface.clone();
    oversized_frame.extend([0xff, 0xff, 0xff, 0x00, 0x00, 0, 0, 0, 1]);
    let half = b"POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\ncontent-length: 900\r\n\r\n{\"model\"".to_vec();
    let table = [
        ("garbage to the router", http, garbage.clone(), false),
        ("half a request, then closed", http, half, true),
        ("garbage to the store", cluster.store_addr(), garbage.clone(), false),
        (
            "a frame of 16 MiB to the store",
            cluster.store_addr(),
            oversized_frame.clone(),
            false,
        ),
        ("a preface and nothing else", cluster.store_addr(), preface, true),
        ("garbage to the worker", worker, garbage, false),
        ("a frame of 16 MiB to the worker", worker, oversized_frame, false),
    ];
    for (name, addr, bytes, half_close) in table {
        match send_raw(addr, &bytes, half_close, PATIENCE).await? {
            RawAnswer::Closed(_) => {}
            RawAnswer::Waits(heard) => panic!("{name}: still open after {} bytes", heard.len()),
        }
    }
    Ok(())
}
