//! Which pages are taken: runs of pages, given out by good fit and joined with their neighbours when they come back.
//!
//! Free runs lie in bins by length, exact up to 64 pages and sixteen to a doubling beyond, with a bitmap of the bins that are
//! not empty (Masmano and others, "TLSF", ECRTS 2004): taking and giving back are a few steps, whatever the arena's size.
//! All of it is in arrays beside the arena, 20 bytes and a bit for a page of 4,096.
//!
//! Invariants: runs cover all pages without overlap; no two free runs touch; `tags` holds a run's length and state at its
//! first and last page (what lies between is stale and never read); `starts` has a bit for each run's first page; a free run
//! is in the bin of its length if and only if it does not touch the fence.

use std::ops::Range;

/// No run.
const NONE: u32 = u32::MAX;
/// Lengths up to it have a bin each.
const EXACT: u32 = 64;
/// Bins between a power of two and the next.
const STEPS: u32 = 16;
const BINS: usize = (EXACT + (31 - 6) * STEPS) as usize;
/// How many runs of the right bin are looked at before one of a larger bin is split.
const SAME_BIN_MAX: usize = 16;
/// How many runs are looked at for a window.
const WINDOW_RUNS_MAX: usize = 4096;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Run {
    pub(super) start: u32,
    pub(super) pages: u32,
    pub(super) free: bool,
}

impl Run {
    pub(super) fn end(&self) -> u32 {
        self.start + self.pages
    }
}

#[derive(Clone, Copy, Debug)]
struct Link {
    previous: u32,
    next: u32,
}

#[derive(Debug)]
pub(super) struct Runs {
    tags: Box<[u32]>,
    links: Box<[Link]>,
    starts: Box<[u64]>,
    bins: Box<[u32; BINS]>,
    filled: [u64; BINS.div_ceil(64)],
    pages: u32,
    used: u32,
    fence: Range<u32>,
    /// Where the next search for a window begins.
    cursor: u32,
}

impl Runs {
    /// `pages` free pages; at most 2^31 - 1.
    pub(super) fn new(pages: u32) -> Self {
        assert!(pages < 1 << 31, "a tag holds 31 bits of length");
        let unlinked = Link {
            previous: NONE,
            next: NONE,
        };
        let mut runs = Self {
            tags: vec![0; pages as usize].into(),
            links: vec![unlinked; pages as usize].into(),
            starts: vec![0; (pages as usize).div_ceil(64)].into(),
            bins: Box::new([NONE; BINS]),
            filled: [0; BINS.div_ceil(64)],
            pages,
            used: 0,
            fence: 0..0,
            cursor: 0,
        };
        if pages > 0 {
            runs.mark(0, pages, true);
            runs.link(0, pages);
        }
        runs
    }

    pub(super) fn pages(&self) -> u32 {
        self.pages
    }

    pub(super) fn used(&self) -> u32 {
        self.used
    }

    /// Takes a run of exactly `pages`, more than none.
    pub(super) fn take(&mut self, pages: u32) -> Option<u32> {
        debug_assert!(pages > 0);
        let run = self.find(pages)?;
        self.unlink(run.start, run.pages);
        self.split(run, pages);
        Some(run.start)
    }

    /// Takes the first `pages` of the fence, if they are all free; the fence must be up.
    pub(super) fn take_fenced(&mut self, pages: u32) -> Option<u32> {
        let fence = std::mem::replace(&mut self.fence, 0..0);
        if fence.is_empty() {
            return None;
        }
        // What was freed may have joined a free run before the fence.
        let run = self.run(self.start_from(fence.start));
        let fits = run.free && run.pages >= pages;
        if fits {
            // As if it had come out of a bin; the rest, and what else was kept out of the bins, goes into them.
            self.split(run, pages);
            self.relink(fence.start.max(run.end())..fence.end);
        } else {
            self.relink(fence);
        }
        fits.then_some(run.start)
    }

    /// Gives back the run that starts at `start`.
    pub(super) fn give(&mut self, start: u32) {
        let run = self.run(start);
        assert!(!run.free && run.pages > 0, "a run is given back once");
        self.used -= run.pages;
        let mut whole = Run { free: true, ..run };
        if whole.end() < self.pages {
            let next = self.run(whole.end());
            if next.free {
                self.unlink_unless_fenced(next);
                self.clear_start(next.start);
                whole.pages += next.pages;
            }
        }
        if start > 0 {
            let tag = self.tags[start as usize - 1];
            if tag & 1 == 1 {
                let previous = self.run(start - (tag >> 1));
                self.unlink_unless_fenced(previous);
                self.clear_start(start);
                whole.start = previous.start;
                whole.pages += previous.pages;
            }
        }
        self.mark(whole.start, whole.pages, true);
        if !self.is_fenced(whole) {
            self.link(whole.start, whole.pages);
        }
    }

    /// Finds neighbours that together have at least `pages` pages and as few taken ones as a bounded search shows, all of them
    /// movable, and keeps what is free in them out of [`Self::take`]'s sight until [`Self::take_fenced`] or
    /// [`Self::lower_fence`]. Answers with the runs in it that are taken.
    pub(super) fn raise_fence(&mut self, pages: u32, movable: impl Fn(u32) -> bool) -> Option<Vec<Run>> {
        debug_assert!(self.fence.is_empty(), "one fence at a time");
        let window = self.window(pages, movable)?;
        let mut taken = Vec::new();
        let mut at = window.start;
        while at < window.end {
            let run = self.run(at);
            if run.free {
                self.unlink(run.start, run.pages);
            } else {
                taken.push(run);
            }
            at = run.end();
        }
        self.fence = window;
        Some(taken)
    }

    pub(super) fn lower_fence(&mut self) {
        let fence = std::mem::replace(&mut self.fence, 0..0);
        self.relink(fence);
    }

    /// The first page of the taken run that covers `page`.
    pub(super) fn covering(&self, page: u32) -> Option<u32> {
        (page < self.pages)
            .then(|| self.start_from(page))
            .filter(|&start| !self.run(start).free)
    }

    /// Whether a fence is up.
    pub(super) fn is_fenced_off(&self) -> bool {
        !self.fence.is_empty()
    }

    /// The run that starts at `start`.
    pub(super) fn run(&self, start: u32) -> Run {
        let tag = self.tags[start as usize];
        Run {
            start,
            pages: tag >> 1,
            free: tag & 1 == 1,
        }
    }

    /// The window of runs with the fewest taken pages, of those from the cursor on that the search looks at.
    fn window(&mut self, pages: u32, movable: impl Fn(u32) -> bool) -> Option<Range<u32>> {
        if pages > self.pages {
            return None;
        }
        // What is moved has to fit somewhere: a run that is longer than all free ones cannot be.
        let longest = self.longest_free();
        let (mut best, mut best_cost) = (None, u32::MAX);
        let (mut first, mut cost) = (self.start_from(self.cursor), 0);
        let mut at = first;
        for _ in 0..WINDOW_RUNS_MAX {
            if at >= self.pages {
                (first, at, cost) = (0, 0, 0);
            }
            let run = self.run(at);
            at = run.end();
            if !run.free {
                if run.pages > longest || !movable(run.start) {
                    (first, cost) = (at, 0);
                    continue;
                }
                cost += run.pages;
            }
            while at - first >= pages {
                if cost < best_cost {
                    (best, best_cost) = (Some(first..at), cost);
                }
                let left = self.run(first);
                cost -= if left.free { 0 } else { left.pages };
                first = left.end();
            }
        }
        self.cursor = at;
        best
    }

    /// The pages of a free run that is one of the longest, within a sixteenth; 0 where none is free.
    fn longest_free(&self) -> u32 {
        let words = self.filled.iter().enumerate().rev();
        let mut filled = words.filter(|(_, bits)| **bits != 0);
        filled.next().map_or(0, |(word, bits)| {
            let bin = word * 64 + 63 - bits.leading_zeros() as usize;
            self.run(self.bins[bin]).pages
        })
    }

    /// The start of the run that covers `page`.
    fn start_from(&self, page: u32) -> u32 {
        let page = if page < self.pages { page } else { 0 };
        let mut word = page as usize / 64;
        let mut bits = self.starts[word] & (u64::MAX >> (63 - page % 64));
        while bits == 0 {
            word -= 1;
            bits = self.starts[word];
        }
        word as u32 * 64 + 63 - bits.leading_zeros()
    }

    fn find(&self, pages: u32) -> Option<Run> {
        let bin = bin_of(pages);
        let mut larger = bin;
        if pages > EXACT {
            // Lengths differ within a bin: look at some, then take from a bin where all are long enough.
            larger += 1;
            let mut at = self.bins[bin];
            for _ in 0..SAME_BIN_MAX {
                if at == NONE {
                    break;
                }
                let run = self.run(at);
                if run.pages >= pages {
                    return Some(run);
                }
                at = self.links[at as usize].next;
            }
        }
        let first = self.first_filled(larger)?;
        Some(self.run(self.bins[first]))
    }

    fn first_filled(&self, bin: usize) -> Option<usize> {
        let mut word = bin / 64;
        let mut bits = *self.filled.get(word)? & (u64::MAX << (bin % 64));
        while bits == 0 {
            word += 1;
            bits = *self.filled.get(word)?;
        }
        Some(word * 64 + bits.trailing_zeros() as usize)
    }

    /// Marks the first `pages` of a free run that is in no bin as taken, and puts the rest where it belongs.
    fn split(&mut self, run: Run, pages: u32) {
        self.used += pages;
        self.mark(run.start, pages, false);
        if run.pages > pages {
            let rest = Run {
                start: run.start + pages,
                pages: run.pages - pages,
                free: true,
            };
            self.mark(rest.start, rest.pages, true);
            if !self.is_fenced(rest) {
                self.link(rest.start, rest.pages);
            }
        }
    }

    /// Puts the free runs that touched a fence, now gone, into their bins.
    fn relink(&mut self, fence: Range<u32>) {
        let mut at = if fence.is_empty() {
            fence.end
        } else {
            self.start_from(fence.start)
        };
        while at < fence.end {
            let run = self.run(at);
            if run.free {
                self.link(run.start, run.pages);
            }
            at = run.end();
        }
    }

    fn is_fenced(&self, run: Run) -> bool {
        run.start < self.fence.end && self.fence.start < run.end()
    }

    fn mark(&mut self, start: u32, pages: u32, free: bool) {
        let tag = pages << 1 | u32::from(free);
        self.tags[start as usize] = tag;
        self.tags[(start + pages - 1) as usize] = tag;
        self.starts[start as usize / 64] |= 1 << (start % 64);
    }

    fn clear_start(&mut self, start: u32) {
        self.starts[start as usize / 64] &= !(1 << (start % 64));
    }

    fn link(&mut self, start: u32, pages: u32) {
        let bin = bin_of(pages);
        let next = std::mem::replace(&mut self.bins[bin], start);
        if next != NONE {
            self.links[next as usize].previous = start;
        }
        self.links[start as usize] = Link { previous: NONE, next };
        self.filled[bin / 64] |= 1 << (bin % 64);
    }

    fn unlink_unless_fenced(&mut self, run: Run) {
        if !self.is_fenced(run) {
            self.unlink(run.start, run.pages);
        }
    }

    fn unlink(&mut self, start: u32, pages: u32) {
        let Link { previous, next } = self.links[start as usize];
        if next != NONE {
            self.links[next as usize].previous = previous;
        }
        if previous != NONE {
            self.links[previous as usize].next = next;
            return;
        }
        let bin = bin_of(pages);
        self.bins[bin] = next;
        if next == NONE {
            self.filled[bin / 64] &= !(1 << (bin % 64));
        }
    }
}

/// The bin of a length; lengths in a bin beyond [`EXACT`] differ by less than a sixteenth.
fn bin_of(pages: u32) -> usize {
    if pages <= EXACT {
        return pages as usize - 1;
    }
    let log = pages.ilog2();
    let step = pages >> (log - 4) & (STEPS - 1);
    (EXACT + (log - 6) * STEPS + step) as usize
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// All runs from the first page to the last, with every invariant checked on the way.
    fn check(runs: &Runs) -> Vec<Run> {
        let (mut all, mut at, mut used) = (Vec::new(), 0, 0);
        while at < runs.pages {
            let run = runs.run(at);
            assert!(run.pages > 0 && run.end() <= runs.pages);
            assert_eq!(runs.run(run.end() - 1).pages, run.pages, "both ends say the same");
            assert_eq!(runs.starts[at as usize / 64] >> (at % 64) & 1, 1);
            assert!(
                !run.free || all.last().is_none_or(|last: &Run| !last.free),
                "free runs join"
            );
            used += if run.free { 0 } else { run.pages };
            all.push(run);
            at = run.end();
        }
        assert_eq!(used, runs.used);
        assert_eq!(
            runs.starts.iter().map(|w| w.count_ones()).sum::<u32>() as usize,
            all.len()
        );
        let mut binned = 0;
        for (bin, &head) in runs.bins.iter().enumerate() {
            assert_eq!(runs.filled[bin / 64] >> (bin % 64) & 1 == 1, head != NONE);
            let mut at = head;
            while at != NONE {
                let run = runs.run(at);
                assert!(run.free && bin_of(run.pages) == bin && !runs.is_fenced(run));
                binned += 1;
                at = runs.links[at as usize].next;
            }
        }
        let free = all.iter().filter(|run| run.free && !runs.is_fenced(**run)).count();
        assert_eq!(binned, free);
        all
    }

    #[test]
    fn bins_rise_and_differ_by_a_sixteenth() {
        let mut last = 0;
        for pages in (1..100_000).chain([1 << 20, (1 << 31) - 1]) {
            let bin = bin_of(pages);
            assert!(bin >= last && bin < BINS, "{pages}");
            last = bin;
        }
        assert!((65..100_000_u32).all(|pages| bin_of(pages) != bin_of(pages + pages.div_ceil(16))));
    }

    #[test]
    fn what_does_not_fit_is_refused_and_a_full_arena_comes_back() {
        let mut runs = Runs::new(100);
        assert_eq!(runs.take(101), None);
        let a = runs.take(60).unwrap();
        assert_eq!((a, runs.take(41)), (0, None));
        let b = runs.take(40).unwrap();
        assert_eq!((b, runs.take(1), runs.used()), (60, None, 100));
        runs.give(a);
        runs.give(b);
        assert_eq!(check(&runs).len(), 1);
        assert_eq!(
            (Runs::new(0).take(1), Runs::new(0).raise_fence(1, |_| true)),
            (None, None)
        );
    }

    #[test]
    fn a_fence_collects_a_long_run_out_of_short_ones() {
        let mut runs = Runs::new(40);
        let taken: Vec<u32> = (0..20).map(|_| runs.take(2).unwrap()).collect();
        taken.iter().step_by(2).for_each(|&start| runs.give(start));
        assert_eq!(runs.take(4), None, "half is free, in runs of 2");
        assert_eq!(runs.raise_fence(6, |_| false), None);
        let in_the_way = runs.raise_fence(6, |start| start >= 20).unwrap();
        assert!(in_the_way.len() <= 2 && in_the_way.iter().all(|run| run.start >= 20 && run.pages == 2));
        for run in in_the_way {
            let home = runs.take(2).unwrap();
            assert!(!runs.fence.contains(&home), "not moved within the fence");
            runs.give(run.start);
            check(&runs);
        }
        assert!(runs.take_fenced(6).is_some());
        check(&runs);
        assert_eq!(runs.used(), 26);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        /// Whatever is taken, given back and fenced: no overlap, nothing lost, all of it comes back.
        #[test]
        fn runs_never_overlap_and_all_come_back(
            pages in 1..3000_u32,
            steps in prop::collection::vec((0..8u8, 1..200_u32, any::<prop::sample::Index>()), 1..300),
        ) {
            let mut runs = Runs::new(pages);
            let mut held: Vec<(u32, u32)> = Vec::new();
            for (what, want, which) in steps {
                match what {
                    0..=3 => match runs.take(want) {
                        Some(start) => held.push((start, want)),
                        // Good fit may pass over a run of the same bin only behind many that are too short.
                        None if want <= EXACT => prop_assert!(check(&runs).iter().all(|run| !run.free || run.pages < want)),
                        None => {}
                    },
                    4..=6 if !held.is_empty() => {
                        let (start, _) = held.swap_remove(which.index(held.len()));
                        runs.give(start);
                    }
                    7 => {
                        if let Some(in_the_way) = runs.raise_fence(want, |start| start % 5 > 0) {
                            for run in in_the_way {
                                prop_assert!(run.start % 5 > 0);
                                let Some(home) = runs.take(run.pages) else { continue };
                                prop_assert!(!runs.fence.contains(&home));
                                runs.give(run.start);
                                held.retain(|&(start, _)| start != run.start);
                                held.push((home, run.pages));
                                check(&runs);
                            }
                            match runs.take_fenced(want) {
                                Some(start) => held.push((start, want)),
                                None => { check(&runs); }
                            }
                        }
                    }
                    _ => {}
                }
                let all = check(&runs);
                let mut taken: Vec<_> = all.iter().filter(|run| !run.free).map(|run| (run.start, run.pages)).collect();
                held.sort_unstable();
                taken.sort_unstable();
                prop_assert_eq!(&held, &taken);
            }
            held.into_iter().for_each(|(start, _)| runs.give(start));
            prop_assert_eq!(check(&runs).len(), 1);
            prop_assert_eq!(runs.take(pages), Some(0));
        }
    }
}
