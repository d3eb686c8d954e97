use super::*;

const D: usize = 2;

/// Key and value of a position; no two are alike.
fn row(position: u32) -> ([f16; D], [f16; D]) {
    let of = |part: u32| f16::from_bits((position * 4 + part) as u16);
    ([of(0), of(1)], [of(2), of(3)])
}

fn rows(positions: impl Iterator<Item = u32>) -> (Vec<f16>, Vec<f16>) {
    let (mut keys, mut values) = (Vec::new(), Vec::new());
    for position in positions {
        let (key, value) = row(position);
        keys.extend(key);
        values.extend(value);
    }
    (keys, values)
}

/// The store's half of the rule, as plainly as it can be written: positions, most recently used last.
struct Plain {
    rows_max: usize,
    order: Vec<u32>,
}

impl Plain {
    /// Indices of what is to be sent.
    fn reply(&mut self, positions: &[u32]) -> Vec<u32> {
        let is_new = |(_, position): &(usize, &u32)| !self.order.contains(position);
        let sent = positions
            .iter()
            .enumerate()
            .filter(is_new)
            .map(|(at, _)| at as u32)
            .collect();
        self.order.retain(|position| !positions.contains(position));
        self.order.extend(positions);
        self.order.drain(..self.order.len().saturating_sub(self.rows_max));
        sent
    }
}

fn complete(cache: &mut RowCache, positions: &[u32], sent: &[u32]) -> Result<(Vec<f16>, Vec<f16>), String> {
    let (sent_keys, sent_values) = rows(sent.iter().map(|at| positions[*at as usize]));
    let reply = SentRows {
        positions,
        sent,
        keys: &sent_keys,
        values: &sent_values,
    };
    let (mut keys, mut values) = (Vec::new(), Vec::new());
    cache.complete(reply, &mut keys, &mut values)?;
    Ok((keys, values))
}

#[test]
fn what_is_sent_and_what_stays() {
    // Positions of a reply, what must be sent of it, what is kept after it: least recently used first.
    let table: [(&[u32], &[u32], &[u32]); 7] = [
        (&[1, 2], &[0, 1], &[1, 2]),
        (&[2, 3], &[1], &[1, 2, 3]),
        (&[1], &[], &[2, 3, 1]),
        (&[4], &[0], &[3, 1, 4]),
        // More than fits: hits are those of before, and the last ones stay.
        (&[1, 5, 6, 7], &[1, 2, 3], &[5, 6, 7]),
        (&[], &[], &[5, 6, 7]),
        (&[5, 7], &[], &[6, 5, 7]),
    ];
    let mut plain = Plain {
        rows_max: 3,
        order: Vec::new(),
    };
    let mut cache = RowCache::new(3, D);
    for (positions, sent, kept) in table {
        assert_eq!(plain.reply(positions), sent, "{positions:?}");
        assert_eq!(plain.order, kept, "{positions:?}");
        assert_eq!(
            complete(&mut cache, positions, sent),
            Ok(rows(positions.iter().copied())),
            "{positions:?}"
        );
        let mut of_cache: Vec<u32> = cache.slots.keys().copied().collect();
        let mut expected = kept.to_vec();
        of_cache.sort_unstable();
        expected.sort_unstable();
        assert_eq!(of_cache, expected, "{positions:?}");
    }
}

#[test]
fn both_halves_agree_over_any_stream() {
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let mut random = |below: u32| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 33) as u32 % below
    };
    for rows_max in [0, 1, 2, 7, 40, 300] {
        let mut plain = Plain {
            rows_max,
            order: Vec::new(),
        };
        let mut cache = RowCache::new(rows_max, D);
        let mut hits = 0;
        for step in 0..400 {
            let mut positions: Vec<u32> = (0..random(24)).map(|_| step / 8 + random(60)).collect();
            positions.sort_unstable();
            positions.dedup();
            let sent = plain.reply(&positions);
            hits += positions.len() - sent.len();
            let found = complete(&mut cache, &positions, &sent).expect("the halves agree");
            assert_eq!(found, rows(positions.iter().copied()), "step {step} of {rows_max}");
            assert_eq!(cache.slots.len(), plain.order.len(), "step {step} of {rows_max}");
            // Slots are used again: no more than the rows that may be kept and those of one reply.
            assert!(
                cache.uses.len() <= rows_max + 24,
                "{} slots for {rows_max}",
                cache.uses.len()
            );
        }
        assert_eq!(hits > 0, rows_max > 0, "{hits} hits of {rows_max}");
    }
}

#[test]
fn halves_that_disagree_are_found_out() {
    let table: [(&str, &[u32], &[u32], &str); 4] = [
        ("never sent", &[1, 9], &[0], "not kept here"),
        ("no such index", &[3], &[0, 1], "of no position"),
        ("out of order", &[3, 4], &[1, 0], "not kept here"),
        ("twice", &[3], &[0, 0], "of no position"),
    ];
    for (name, positions, sent, words) in table {
        let mut cache = RowCache::new(8, D);
        let (keys, values) = rows(0..sent.len() as u32);
        let reply = SentRows {
            positions,
            sent,
            keys: &keys,
            values: &values,
        };
        let error = cache.complete(reply, &mut Vec::new(), &mut Vec::new()).expect_err(name);
        assert!(error.contains(words), "{name}: {error}");
    }
    let short = SentRows {
        positions: &[1],
        sent: &[0],
        keys: &[f16::ONE],
        values: &[],
    };
    let error = RowCache::new(8, D).complete(short, &mut Vec::new(), &mut Vec::new());
    assert_eq!(error, Err("1 rows were announced, and others came".to_owned()));
}

#[test]
fn a_budget_in_bytes_is_rows() {
    // SmolLM2: 30 layers of 3 heads, 256 bytes a row.
    let table = [(0, 0), (23_039, 0), (23_040, 1), (32 << 20, 1456)];
    for (bytes, expected) in table {
        assert_eq!(rows_within(bytes, 30, 3, 64), expected, "{bytes} bytes");
    }
}
