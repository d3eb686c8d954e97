//! Row 18: a bucket that answers 503, resets, sends too little or something else, stalls, or knows our key no more.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use kvasir_block::{Checksum, LayerBlockKey};
use kvasir_tier::{BreakerConfig, Credentials, ObjectConfig, ObjectRead, ObjectTier, Offer, StoreId};

use crate::{
    Run, Tier,
    bucket::{BUCKET, Bucket, KEY_ID, SECRET},
    corpus::{Corpus, schema},
    proxy::{Damage, Proxy, Weather},
    remote::block_on,
};

/// 64 layer blocks of 16 KiB: 1 MiB in a few objects.
const BLOCKS: usize = 32;
const LAYERS: u16 = 2;
/// What a read may take.
const DEADLINE: Duration = Duration::from_millis(400);
/// How much later than that a read may come back: threads of this machine are busy with other suites.
const GRACE: Duration = Duration::from_millis(600);

const WEATHERS: [Weather; 8] = [
    Weather::of(&[Damage::Flip], 0.2),
    Weather::of(&[Damage::Omit], 0.2),
    Weather::of(&[Damage::Duplicate], 0.2),
    Weather::of(&[Damage::Cut], 0.2),
    Weather::of(&[Damage::Unavailable], 0.5),
    Weather::of(&[Damage::Expired], 0.5),
    Weather::of(&[Damage::Stall], 0.1),
    Weather::of(
        &[
            Damage::Flip,
            Damage::Omit,
            Damage::Duplicate,
            Damage::Cut,
            Damage::Unavailable,
            Damage::Expired,
        ],
        0.3,
    ),
];

pub(super) fn inflict(run: &mut Run) -> Result<()> {
    run.rounds(|run, round| block_on(one_bucket(run, round)))
}

async fn one_bucket(run: &mut Run, round: u64) -> Result<()> {
    let bucket = Bucket::start().await?;
    let proxy = Proxy::start(bucket.addr, run.plan.seed ^ round).await?;
    let corpus = Corpus::new("object", &schema(LAYERS, 16 << 10), run.seed_of(round), BLOCKS);
    let writer = ObjectTier::open(config(bucket.addr, 1)).context("past the proxy")?;
    let reader = ObjectTier::open(config(proxy.addr, 2)).context("through the proxy")?;
    let before = run.tally.faults;
    // The tier waits for its own threads, and this one serves the bucket.
    tokio::task::block_in_place(|| {
        writer.open_namespace(corpus.namespace);
        put(&writer, &corpus)?;
        for (i, weather) in WEATHERS.iter().cycle().take(WEATHERS.len() * 2).enumerate() {
            proxy.set(Weather::CLEAR);
            // The breaker closes again, and what was taken for damaged is learnt anew.
            let reader_again;
            let reader = if i == 0 {
                &reader
            } else {
                reader_again = ObjectTier::open(config(proxy.addr, 2 + i as u64))?;
                &reader_again
            };
            reader.open_namespace(corpus.namespace);
            let known = reader.refresh(corpus.namespace, Instant::now() + Duration::from_secs(5));
            ensure!(known, "a clear bucket cannot be listed: {:?}", reader.stats().degraded);
            proxy.set(*weather);
            read(run, reader, &corpus)?;
            // What is written in such weather is whole, or not there.
            let extra = Corpus::new("object", &corpus.schema, run.seed_of(round) ^ (1 + i as u64), 4);
            for key in extra.keys() {
                let payload = extra.payload(key);
                let checksum = Checksum::of(&payload);
                ensure!(
                    reader.offer(key, payload, checksum) == Offer::Queued,
                    "an offer was not taken"
                );
            }
            let flushed = reader.flush(Instant::now() + DEADLINE).is_ok();
            run.tally.note("flushes that did not come through", u64::from(!flushed));
            proxy.set(Weather::CLEAR);
            run.tally
                .note("times that the breaker opened", reader.stats().breaker_opened);
            // What it had queued is lost with it, or was taken: both are said.
            let _ = reader.stop(Instant::now() + DEADLINE);
            // Its own breaker may be open from the weather before: a listing that fails is asked for again.
            let listed = (0..20).any(|_| {
                let listed = writer.refresh(extra.namespace, Instant::now() + Duration::from_secs(5));
                if !listed {
                    std::thread::sleep(Duration::from_millis(250));
                }
                listed
            });
            ensure!(listed, "the bucket was not listed in fair weather");
            let keys: Vec<_> = extra.keys().collect();
            for (key, mut read) in keys
                .iter()
                .zip(writer.get_many(&keys, Instant::now() + Duration::from_secs(5)))
            {
                let mut got = count(run, &extra, *key, &read);
                // Others may hold the bucket up: what was not listed in time is asked for again.
                for _ in 0..5 {
                    if got || !flushed || weather.alters() {
                        break;
                    }
                    std::thread::sleep(Duration::from_millis(250));
                    writer.refresh(extra.namespace, Instant::now() + Duration::from_secs(5));
                    for again in writer.get_many(&[*key], Instant::now() + Duration::from_secs(5)) {
                        got = count(run, &extra, *key, &again);
                        read = again;
                    }
                }
                // The bucket takes what arrives for what was sent: an upload that was altered on its way is there, and of no use.
                ensure!(
                    !flushed || got || weather.alters() || run.tally.wrong > 0,
                    "{key:?} was flushed and came to {read:?}"
                );
            }
            run.tally.faults = before + proxy.damaged();
        }
        let _ = writer.stop(Instant::now() + DEADLINE);
        Ok(())
    })
}

fn config(addr: std::net::SocketAddr, store: u64) -> ObjectConfig {
    let mut config = ObjectConfig::new(format!("s3://{BUCKET}/faults"), StoreId::from_u64(store));
    config.endpoint = Some(format!("http://localhost:{}", addr.port()));
    config.path_style = true;
    config.allow_http = true;
    config.credentials = Credentials::Key {
        id: KEY_ID.to_owned(),
        secret: SECRET.to_owned(),
        token: None,
    };
    config.object_bytes = 256 << 10;
    config.queue_bytes_max = 4 << 20;
    config.open_age_max = Duration::from_millis(50);
    config.first_byte_max = Duration::from_millis(300);
    config.read_max = Duration::from_millis(600);
    config.write_max = Duration::from_secs(2);
    config.breaker = BreakerConfig {
        failures: 4,
        window: Duration::from_secs(2),
        pause: Duration::from_millis(50),
    };
    config
}

fn put(tier: &ObjectTier, corpus: &Corpus) -> Result<()> {
    for key in corpus.keys() {
        let payload = corpus.payload(key);
        let checksum = Checksum::of(&payload);
        ensure!(
            tier.offer(key, payload, checksum) == Offer::Queued,
            "an offer was not taken"
        );
    }
    Ok(tier.flush(Instant::now() + Duration::from_secs(20))?)
}

/// Reads everything, a few blocks at a time, each by its deadline.
fn read(run: &mut Run, tier: &ObjectTier, corpus: &Corpus) -> Result<()> {
    let keys: Vec<_> = corpus.keys().collect();
    for some in keys.chunks(8) {
        let begun = Instant::now();
        let reads = tier.get_many(some, begun + DEADLINE);
        let took = begun.elapsed();
        ensure!(took < DEADLINE + GRACE, "a read of {DEADLINE:?} took {took:?}");
        run.note_longest("longest read, ms", took);
        for (key, read) in some.iter().zip(&reads) {
            count(run, corpus, *key, read);
        }
    }
    Ok(())
}

/// Counts what came of a read; true for the right bytes.
fn count(run: &mut Run, corpus: &Corpus, key: LayerBlockKey, read: &ObjectRead) -> bool {
    match read {
        ObjectRead::Hit { payload, .. } if corpus.is_right(key, payload) => {
            run.tally.hit(Tier::Object);
            return true;
        }
        ObjectRead::Hit { .. } => run.tally.wrong(|| format!("{key:?}, from the bucket")),
        ObjectRead::Miss => run.tally.misses += 1,
        ObjectRead::Corrupt => run.tally.corrupt += 1,
        ObjectRead::TooLate | ObjectRead::Unavailable => run.tally.shed += 1,
    }
    false
}
