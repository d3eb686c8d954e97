use super::*;

const IDLE: Load = Load {
    running: 0,
    waiting: 0,
    prefill_tokens_waiting: 0,
    kv_usage: 0.0,
};

fn worker(id: u32, device_blocks: usize, load: Load) -> Candidate {
    Candidate {
        worker: WorkerId(id),
        device_blocks,
        load,
    }
}

fn prompt(tokens: usize, store_blocks: usize) -> Prompt {
    Prompt {
        tokens,
        block_tokens: 64,
        store_blocks,
    }
}

/// Who is chosen over turns 0 and 1.
fn chosen(prompt: Prompt, candidates: &[Candidate]) -> Vec<u32> {
    let prices = PolicyConfig::default();
    let mut ids: Vec<u32> = (0..2)
        .filter_map(|turn| choose(&prompt, candidates, &prices, turn))
        .map(|choice| choice.worker.0)
        .collect();
    ids.dedup();
    ids
}

#[test]
fn the_cheapest_worker_is_chosen() {
    let busy = |running| Load { running, ..IDLE };
    let queue = |prefill_tokens_waiting| Load {
        waiting: 1,
        prefill_tokens_waiting,
        ..IDLE
    };
    let full = Load { kv_usage: 1.0, ..IDLE };
    let broken = Load {
        kv_usage: f32::NAN,
        ..IDLE
    };
    let table: [(&str, Prompt, Vec<Candidate>, &[u32]); 12] = [
        ("nobody is there", prompt(1000, 0), vec![], &[]),
        ("one is there", prompt(1000, 0), vec![worker(7, 0, busy(9))], &[7]),
        (
            "equals take turns",
            prompt(1000, 0),
            vec![worker(0, 0, IDLE), worker(1, 0, IDLE)],
            &[0, 1],
        ),
        (
            "the holder of the prefix",
            prompt(1000, 0),
            vec![worker(0, 0, IDLE), worker(1, 10, IDLE)],
            &[1],
        ),
        (
            "the holder of the longer prefix",
            prompt(1000, 0),
            vec![worker(0, 9, IDLE), worker(1, 10, IDLE)],
            &[1],
        ),
        (
            "a hit is worth some load",
            prompt(1000, 0),
            vec![worker(0, 0, IDLE), worker(1, 15, busy(8))],
            &[1],
        ),
        (
            "but not any load",
            prompt(1000, 0),
            vec![worker(0, 0, IDLE), worker(1, 15, queue(2000))],
            &[0],
        ),
        (
            "what anyone can load makes holders less special",
            prompt(1000, 15),
            vec![worker(0, 0, IDLE), worker(1, 15, busy(8))],
            &[0],
        ),
        (
            "having is still better than loading",
            prompt(1000, 15),
            vec![worker(0, 0, IDLE), worker(1, 15, IDLE)],
            &[1],
        ),
        (
            "the less busy one",
            prompt(100, 0),
            vec![worker(0, 0, busy(3)), worker(1, 0, busy(2))],
            &[1],
        ),
        (
            "the one with room",
            prompt(100, 0),
            vec![worker(0, 0, full), worker(1, 0, busy(1))],
            &[1],
        ),
        (
            "nonsense counts as full",
            prompt(100, 0),
            vec![worker(0, 0, broken), worker(1, 0, busy(1))],
            &[1],
        ),
    ];
    for (name, prompt, candidates, expected) in table {
        assert_eq!(chosen(prompt, &candidates), expected, "{name}");
    }
}

#[test]
fn every_prompt_token_is_held_or_loaded_or_computed_once() {
    // (prompt tokens, device blocks, store blocks) -> (device, store, compute)
    let table = [
        ((1000, 0, 0), (0, 0, 1000)),
        ((1000, 4, 0), (256, 0, 744)),
        ((1000, 4, 10), (256, 384, 360)),
        ((1000, 10, 4), (640, 0, 360)),
        // A prompt of whole blocks that is wholly held: its last token is computed all the same.
        ((128, 2, 2), (127, 0, 1)),
        ((128, 0, 2), (0, 127, 1)),
        ((1, 0, 0), (0, 0, 1)),
        // More believed to be held than there is.
        ((10, usize::MAX, 3), (9, 0, 1)),
    ];
    for ((tokens, device_blocks, store_blocks), expected) in table {
        let choice = choose(
            &prompt(tokens, store_blocks),
            &[worker(0, device_blocks, IDLE)],
            &PolicyConfig::default(),
            0,
        )
        .expect("one candidate");
        let found = (choice.device_tokens, choice.store_tokens, choice.compute_tokens);
        assert_eq!(
            found, expected,
            "{tokens} tokens, {device_blocks} here, {store_blocks} in the store"
        );
        assert_eq!(found.0 + found.1 + found.2, tokens);
    }
}

#[test]
fn turns_reach_every_equal() {
    let candidates: Vec<Candidate> = (0..3).map(|id| worker(id, 0, IDLE)).collect();
    let mut counts = [0; 3];
    for turn in 0..300 {
        let choice = choose(&prompt(100, 0), &candidates, &PolicyConfig::default(), turn).expect("three candidates");
        counts[choice.worker.0 as usize] += 1;
    }
    assert_eq!(counts, [100; 3]);
}
