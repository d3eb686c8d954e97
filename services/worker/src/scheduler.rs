//! Who computes how many tokens in the next step. A pure decision: no model, no pages, no clock.
//!
//! Decoding sequences come first, one token each. What is left of the step goes to prompts: each in order of age may take
//! half of what is left, and then the oldest take the rest. So the oldest prompt always gets at least half of the step
//! and cannot starve, and a short prompt behind a long one does not wait for all of it.
//!
//! A sequence that loads its prefix joins the others only when all of it has arrived, so that nobody waits for its
//! network; when nobody else can compute, it starts as soon as its first block is there, alone, and waits layer by layer
//! for the rest, which hides loading behind computing exactly where nothing else could be hidden.

/// What the plan needs to know of a running sequence, oldest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Candidate {
    pub(crate) stage: Stage,
    /// Tokens whose KV is not computed yet; at least 1.
    pub(crate) remaining: usize,
    /// All of what remains, or a multiple of this many tokens, is computed in one step: at most `tokens_max` less the number
    /// of candidates, and 1 where it does not matter.
    pub(crate) grain: usize,
}

impl Candidate {
    /// The most of `tokens` that may be computed.
    fn within(&self, tokens: usize) -> usize {
        if tokens >= self.remaining {
            self.remaining
        } else {
            tokens / self.grain * self.grain
        }
    }
}

/// Whether a sequence can take part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stage {
    /// Everything it attends to is in pages.
    Ready,
    /// Its prefix is on its way and the first block is there.
    Arriving,
    /// It waits for something outside.
    Waiting,
}

/// Tokens of one sequence in a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Share {
    /// Index into the candidates.
    pub(crate) index: usize,
    pub(crate) tokens: usize,
}

/// The next step: at most `tokens_max` tokens, which is at least the number of candidates. Empty when nobody can compute.
pub(crate) fn plan(candidates: &[Candidate], tokens_max: usize) -> Vec<Share> {
    let mut left = tokens_max;
    let mut shares: Vec<Share> = Vec::new();
    for (index, candidate) in candidates.iter().enumerate() {
        if candidate.stage == Stage::Ready && candidate.remaining == 1 && left > 0 {
            shares.push(Share { index, tokens: 1 });
            left -= 1;
        }
    }
    let prompts: Vec<usize> = (0..candidates.len())
        .filter(|i| candidates[*i].stage == Stage::Ready && candidates[*i].remaining > 1)
        .collect();
    let mut granted = vec![0; prompts.len()];
    for (slot, index) in prompts.iter().enumerate() {
        // A grain, where half is less: else the oldest could wait for ever.
        let half = left.div_ceil(2).max(candidates[*index].grain.min(left));
        granted[slot] = candidates[*index].within(half);
        left -= granted[slot];
    }
    for (slot, index) in prompts.iter().enumerate() {
        let all = candidates[*index].within(granted[slot] + left);
        left -= all - granted[slot];
        granted[slot] = all;
    }
    for (index, tokens) in prompts.into_iter().zip(granted).filter(|(_, tokens)| *tokens > 0) {
        shares.push(Share { index, tokens });
    }
    if shares.is_empty() {
        let arriving = candidates
            .iter()
            .position(|candidate| candidate.stage == Stage::Arriving);
        shares.extend(arriving.map(|index| Share {
            index,
            tokens: candidates[index].within(tokens_max),
        }));
    }
    shares
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `r5` is ready with 5 tokens left, `a5` arriving, `w5` waiting; `r5/4` in grains of 4. The plan reads `index:tokens`.
    fn check(candidates: &str, tokens_max: usize, expected: &str) {
        let parse = |word: &str| Candidate {
            grain: word
                .split_once('/')
                .map_or(1, |(_, grain)| grain.parse().expect("a number")),
            stage: match &word[..1] {
                "r" => Stage::Ready,
                "a" => Stage::Arriving,
                _ => Stage::Waiting,
            },
            remaining: word[1..].split('/').next().expect("a part").parse().expect("a number"),
        };
        let list: Vec<Candidate> = candidates.split_whitespace().map(parse).collect();
        let shares = plan(&list, tokens_max);
        let text: Vec<String> = shares.iter().map(|s| format!("{}:{}", s.index, s.tokens)).collect();
        assert_eq!(text.join(" "), expected, "{candidates} within {tokens_max}");
        assert!(shares.iter().map(|share| share.tokens).sum::<usize>() <= tokens_max);
    }

    #[test]
    fn plans() {
        check("", 8, "");
        check("r1", 8, "0:1");
        check("r1 r1 r1", 8, "0:1 1:1 2:1");
        check("r100", 8, "0:8");
        check("r5", 8, "0:5");
        check("r100 r1", 8, "1:1 0:7");
        check("r100 r3", 8, "0:6 1:2");
        check("r100 r100", 8, "0:6 1:2");
        check("r100 r2 r2", 16, "0:12 1:2 2:2");
        check("r2 r100", 8, "0:2 1:6");
        check("w5 r3", 8, "1:3");
        check("w5 w1", 8, "");
    }

    #[test]
    fn grains_are_whole_or_the_rest() {
        check("r100/4", 10, "0:8");
        check("r10/4", 10, "0:10");
        check("r9/4 r1", 10, "1:1 0:9");
        check("r11/4 r1", 10, "1:1 0:8");
        // Half of ten is a grain and one; the younger takes what it can of the rest.
        check("r100/4 r100/4", 10, "0:4 1:4");
        check("r100/4 r100", 10, "0:4 1:6");
        // The oldest gets its grain though that is all there is.
        check("r100/8 r3 r3", 10, "0:8 1:1 2:1");
        check("r100/8 r1 r1", 10, "1:1 2:1 0:8");
        check("a100/8", 10, "0:8");
    }

    #[test]
    fn loading_sequences_go_alone_or_wait_for_all_of_it() {
        check("a100", 8, "0:8");
        check("a3 a3", 8, "0:3");
        check("a100 r1", 8, "1:1");
        check("w9 a1", 8, "1:1");
    }

    #[test]
    fn the_oldest_prompt_gets_half_and_everyone_ends() {
        let mut left = [500usize, 30, 30, 400];
        let mut steps = 0;
        while left.iter().any(|n| *n > 0) {
            let (index, list): (Vec<usize>, Vec<Candidate>) = left
                .iter()
                .enumerate()
                .filter(|(_, n)| **n > 0)
                .map(|(i, n)| {
                    (
                        i,
                        Candidate {
                            stage: Stage::Ready,
                            remaining: *n,
                            grain: 1,
                        },
                    )
                })
                .unzip();
            let shares = plan(&list, 64);
            let oldest = shares
                .iter()
                .find(|share| share.index == 0)
                .expect("the oldest takes part");
            assert!(oldest.tokens >= list[0].remaining.min(31));
            for share in shares {
                left[index[share.index]] -= share.tokens;
            }
            steps += 1;
        }
        assert!(steps <= 960 / 64 + 5, "{steps} steps for 960 tokens");
    }
}
