//! Which layers get hints. Pure.
//!
//! A hint costs this side a projection and the store a search. Where forecasts mostly do not serve (a steep head far from its prediction,
//! a store with no thread to spare) both are for nothing, so a layer whose hints did not serve has none for a while, and then one to
//! see whether that has changed.

/// Outcomes of a layer that are remembered.
const REMEMBERED: u32 = 8;
/// Of how many it is judged at least.
const JUDGED: u32 = 4;
/// Queries of a layer without a hint after it was judged; twice as many after each try that fails.
const PAUSE_FIRST: u32 = 32;
const PAUSE_MAX: u32 = 1024;

/// What hints of a sequence came to, layer by layer.
#[derive(Clone, Debug)]
pub struct Hints {
    /// First layer that may have one.
    from: usize,
    layers: Vec<Layer>,
    /// Layer of the last hint. The query before the hinted one is answered only after it was sent.
    sent: Option<usize>,
    /// Layer of the query that is not answered yet, and whether it had a hint.
    asked: Option<(usize, bool)>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Layer {
    /// The last outcomes, a bit each, 1 for one that served.
    served: u8,
    outcomes: u32,
    /// Queries until the next hint.
    pause: u32,
    /// The last pause; 0 where there was none since hints served.
    paused: u32,
}

impl Hints {
    /// Of so many layers, none before `from`.
    pub fn new(layers: usize, from: usize) -> Self {
        Self {
            from,
            layers: vec![Layer::default(); layers],
            sent: None,
            asked: None,
        }
    }

    /// Whether the next query of `layer` is worth a hint.
    pub fn wants(&self, layer: usize) -> bool {
        layer >= self.from && self.layers.get(layer).is_some_and(|layer| layer.pause == 0)
    }

    /// A hint for `layer` was sent.
    pub fn sent(&mut self, layer: usize) {
        self.sent = Some(layer);
    }

    /// The query of `layer` was sent.
    pub fn asked(&mut self, layer: usize) {
        let had_hint = self.sent.take_if(|sent| *sent == layer).is_some();
        self.asked = Some((layer, had_hint));
    }

    /// That query was answered; `served` says whether its hint was of use.
    pub fn answered(&mut self, served: bool) {
        let Some((layer, had_hint)) = self.asked.take() else {
            return;
        };
        match self.layers.get_mut(layer) {
            Some(layer) if had_hint => layer.note(served),
            Some(layer) => layer.pause = layer.pause.saturating_sub(1),
            None => {}
        }
    }
}

impl Layer {
    fn note(&mut self, served: bool) {
        self.served = self.served << 1 | u8::from(served);
        self.outcomes = (self.outcomes + 1).min(REMEMBERED);
        // After a pause one try is enough to go on with it, and one to end it.
        let least = if self.paused > 0 { 1 } else { JUDGED };
        let of_use = (self.served & ((1_u16 << self.outcomes) - 1) as u8).count_ones();
        if self.outcomes >= least && 2 * of_use < self.outcomes {
            let pause = (2 * self.paused).clamp(PAUSE_FIRST, PAUSE_MAX);
            *self = Self {
                pause,
                paused: pause,
                ..Self::default()
            };
        } else if served {
            self.paused = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One token over layers `0..layers`, in a worker's order: a layer's query, the next one's hint, the layer's answer. Tells of
    /// `layer` whether its hint served, `None` where it had none.
    fn token(hints: &mut Hints, layers: usize, layer: usize, serves: bool) -> Option<bool> {
        let mut had = None;
        for at in 0..layers {
            hints.asked(at);
            if at + 1 < layers && hints.wants(at + 1) {
                hints.sent(at + 1);
                had = had.or((at + 1 == layer).then_some(serves));
            }
            hints.answered(at != layer || serves);
        }
        had
    }

    /// What layer 3 gets in each of `tokens`, where a hint serves as `serves` says: `+` and `-` for hints that served and did not, `.` for
    /// none.
    fn run(tokens: usize, serves: impl Fn(usize) -> bool) -> String {
        let mut hints = Hints::new(6, 3);
        let mut told = String::new();
        for at in 0..tokens {
            let served = token(&mut hints, 6, 3, serves(at));
            told.push(served.map_or('.', |served| if served { '+' } else { '-' }));
        }
        assert!(hints.wants(4), "the other layers' hints serve");
        told
    }

    #[test]
    fn layers_whose_hints_do_not_serve_have_none_for_a_while() {
        let (dots, rest) = (|n: usize| ".".repeat(n), |n: usize| "+".repeat(n));
        // As long as at least half of the last eight serve, all layers have hints.
        assert_eq!(run(20, |_| true), rest(20));
        assert_eq!(run(12, |token| token % 2 == 0), "+-".repeat(6));
        // Three failures may be chance, four are not; a try that fails doubles the pause.
        let never = format!("----{}-{}-{}-", dots(32), dots(64), dots(128));
        assert_eq!(run(never.len(), |_| false), never);
        // One that serves ends it, and the next judgement takes four again.
        let recovers = format!("----{}{}", dots(32), rest(8));
        assert_eq!(run(recovers.len(), |token| token > 10), recovers);
        let again = format!("----{}+---{}", dots(32), dots(32));
        assert_eq!(run(again.len(), |token| token == 36), again);
        // The pause has an end however long it goes on.
        let long = run(10_000, |_| false);
        let longest = long.split('-').map(str::len).max();
        assert_eq!(longest, Some(PAUSE_MAX as usize));
    }

    #[test]
    fn each_layer_is_judged_by_itself_and_the_first_have_none() {
        let mut hints = Hints::new(6, 3);
        let wanted = |hints: &Hints| (0..8).filter(|&layer| hints.wants(layer)).collect::<Vec<_>>();
        assert_eq!(wanted(&hints), [3, 4, 5]);
        let mut answer = |layer: usize, hinted: bool, times: u32| {
            for _ in 0..times {
                if hinted {
                    hints.sent(layer);
                }
                hints.asked(layer);
                hints.answered(false);
            }
            wanted(&hints)
        };
        assert_eq!(answer(4, true, 4), [3, 5]);
        // What does not exist has no say, nor a hint for another layer than is asked.
        assert_eq!(answer(77, true, 4), [3, 5]);
        assert_eq!(answer(4, false, PAUSE_FIRST), [3, 4, 5]);
        assert_eq!(wanted(&Hints::new(6, usize::MAX)), [] as [usize; 0]);
    }
}
