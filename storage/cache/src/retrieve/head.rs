//! The search of one KV head: by every key, through sketches, or through sketches and only so far as to find candidates.

use bytes::{BufMut, BytesMut};
use half::f16;
use kvasir_block::Dtype;
use kvasir_index::{Attend, Attended, Excluded, FlatScan, HeadBasis, Parked, Segment, SketchScan, Streaming};

use super::{
    AttendOptions, Form, HeadRows,
    parked::{self, Ahead},
    search::{Buffers, Purpose, Search, Sketched, wants_lift},
    sketches::{self, Extra},
};

/// What was found for one KV head, for all queries.
#[derive(Debug)]
pub(super) struct Head {
    pub(super) scanned: usize,
    pub(super) late: bool,
    pub(super) missing: bool,
    /// Of a search through sketches.
    pub(super) sketch: Option<Extra>,
    /// It attends to sink and window only: nothing was searched.
    pub(super) streaming: bool,
    /// What became of a search that had begun ahead.
    pub(super) ahead: Ahead,
    pub(super) found: HeadFound,
}

#[derive(Debug)]
pub(super) enum HeadFound {
    /// And the share of the searched mass that they hold, per query head.
    Rows(HeadRows, Vec<f32>),
    /// And whether it was more than was asked.
    Attend(Attended, bool),
    /// Candidates for queries to come; `None` where none can be kept.
    Parked(Option<Box<Parked>>),
}

impl Search {
    /// Scans what `excluded` leaves, through sketches where there are some.
    pub(super) fn scanned_head<'a>(
        &'a self,
        kv_head: usize,
        halves: &[Option<&'a [f16]>],
        excluded: &'a Excluded,
        buffers: &mut Buffers<'a>,
    ) -> Head {
        match &self.sketched {
            Some(sketched) => self.sketched_head(kv_head, halves, sketched, excluded, &mut buffers.sketch),
            None => self.flat_head(kv_head, halves, excluded, &mut buffers.flat),
        }
    }

    fn flat_head<'a>(
        &'a self,
        kv_head: usize,
        halves: &[Option<&'a [f16]>],
        excluded: &Excluded,
        scan: &mut FlatScan<'a>,
    ) -> Head {
        let layout = &self.layout;
        scan.begin(self.queries_of(kv_head));
        let (mut late, mut missing) = (false, false);
        for (at, halves) in halves.iter().enumerate() {
            if self.blocks.is_excluded(at, excluded) {
                continue;
            }
            if self.is_late() {
                late = true;
                break;
            }
            match halves {
                Some(halves) => scan.scan(
                    Segment {
                        keys: &halves[layout.keys(kv_head)],
                        values: &halves[layout.values(kv_head)],
                        position: at * layout.block_tokens,
                    },
                    excluded,
                ),
                None => missing = true,
            }
        }
        let found = match self.form {
            Form::Rows { k } => {
                let rows = scan.rows(k);
                let gathered = gather(rows.positions(), layout.head_dim, |take| scan.each_row(&rows, take));
                HeadFound::Rows(gathered, rows.mass)
            }
            Form::Attend {
                target_mass,
                k_max,
                options,
            } => attend(scan, target_mass, k_max, options),
        };
        Head {
            scanned: scan.keys_scanned(),
            late,
            missing,
            sketch: None,
            streaming: false,
            ahead: Ahead::No,
            found,
        }
    }

    /// Whether the caller attends by itself to what a streaming head was found to attend to. Only then may such a head go
    /// unsearched.
    fn keeps_static_set(&self) -> bool {
        let tokens = (self.blocks.len() * self.layout.block_tokens) as u32;
        let kept = [
            0..(Streaming::SINK as u32).min(tokens),
            tokens.saturating_sub(Streaming::WINDOW as u32)..tokens,
        ];
        kept.into_iter()
            .all(|range| self.excluded.searched(range).next().is_none())
    }

    fn streaming_head<'a>(&'a self, kv_head: usize, halves: &[Option<&'a [f16]>], excluded: &Excluded) -> Head {
        let mut flat = FlatScan::new(self.layout.head_dim, self.scale);
        let streaming = self.keeps_static_set();
        let searched = if streaming { &[] } else { halves };
        Head {
            streaming,
            ..self.flat_head(kv_head, searched, excluded, &mut flat)
        }
    }

    fn sketched_head<'a>(
        &'a self,
        kv_head: usize,
        halves: &[Option<&'a [f16]>],
        sketched: &'a Sketched,
        excluded: &'a Excluded,
        scan: &mut SketchScan<'a>,
    ) -> Head {
        let basis = sketched.basis.basis().head(sketched.layer.into(), kv_head);
        if basis.streaming {
            return match self.purpose {
                Purpose::Park { .. } => Head::parked(None),
                Purpose::Answer(_) => self.streaming_head(kv_head, halves, excluded),
            };
        }
        let late = self.is_late();
        let there = |at: usize| halves[at].is_some() && sketched.blocks.has(at);
        let wanted = |at: usize| !self.blocks.is_excluded(at, excluded);
        // When it is late what is not there was given up.
        let missing = !late && (0..halves.len()).any(|at| !there(at) && wanted(at));
        let place = HeadPlace {
            kv_head,
            basis,
            halves,
            sketched,
            excluded,
            whole: !late && !missing,
        };
        match &self.purpose {
            Purpose::Park { head_bytes, .. } => {
                let parked = place.whole.then(|| self.park(&place, scan)).flatten();
                Head::parked(parked.filter(|parked| parked.bytes() <= *head_bytes))
            }
            Purpose::Answer(parked) => {
                let parked = parked.get(kv_head).and_then(|parked| parked.lock().take());
                self.answer_head(&place, parked, scan, (late, missing))
            }
        }
    }

    /// Candidates of predicted queries, more than real ones would get: those are not quite the same.
    fn park<'a>(&'a self, place: &HeadPlace<'a, '_>, scan: &mut SketchScan<'a>) -> Option<Box<Parked>> {
        if !self.begin_anew(place, scan) {
            return None;
        }
        let how = sketches::wanted(self.form, scan.keys_scanned());
        let effort = parked::generous(how.effort);
        Some(Box::new(match self.form {
            Form::Rows { .. } => scan.park_for_rows(effort),
            Form::Attend { .. } => scan.park(Attend { effort, ..how }),
        }))
    }

    fn answer_head<'a>(
        &'a self,
        place: &HeadPlace<'a, '_>,
        parked: Option<Box<Parked>>,
        scan: &mut SketchScan<'a>,
        (late, missing): (bool, bool),
    ) -> Head {
        let q = self.queries_of(place.kv_head);
        // Of a layer that was clustered meanwhile its candidates are other keys.
        let column = place.sketched.blocks.column(place.kv_head);
        let parked = parked.filter(|parked| column.is_some_and(|column| parked.is_of(column)));
        let mut ahead = match &parked {
            None => Ahead::No,
            Some(parked) if parked::is_near(parked, q) => Ahead::Used,
            Some(_) => Ahead::TooFar,
        };
        let expected = parked
            .as_ref()
            .map_or_else(Vec::new, |parked| parked.covered().to_vec());
        let resumed = parked
            .filter(|_| ahead == Ahead::Used && place.whole)
            .is_some_and(|parked| scan.begin_parked(*parked, q).is_ok() && self.add(place, scan));
        let begun = resumed || self.begin_anew(place, scan);
        if !resumed && ahead == Ahead::Used {
            ahead = Ahead::No;
        }
        let head_dim = self.layout.head_dim;
        let (found, extra) = match self.form {
            Form::Rows { k } => {
                let scanned = scan.keys_scanned();
                let before = scan.cost();
                let rows = scan.rows(k, sketches::wanted(self.form, scanned).effort);
                let heads = (self.queries * self.group) as u64;
                let extra = Extra {
                    rescored: (scan.cost().keys_scored - before.keys_scored) / heads,
                    bytes_read: scan.cost().bytes_read,
                    ..Extra::default()
                };
                let gathered = gather(rows.positions(), head_dim, |take| scan.each_row(&rows, take));
                (HeadFound::Rows(gathered, rows.mass), extra)
            }
            Form::Attend {
                target_mass,
                k_max,
                options,
            } if wants_lift(self.form) => {
                let (attended, extra) = sketches::attend_lifted(scan, target_mass, k_max, options);
                (HeadFound::Attend(attended, false), extra)
            }
            Form::Attend { .. } => {
                let wanted = sketches::wanted(self.form, scan.keys_scanned());
                let (layer, kv_head) = (place.sketched.layer, place.kv_head);
                let usual = self.blocks.usual.of(layer, kv_head);
                let (mut attended, mut extra) = sketches::attend(scan, wanted);
                if ahead == Ahead::Used
                    && parked::covers_too_little(&extra, &expected, usual, wanted)
                    && !self.is_late()
                    && self.begin_anew(place, scan)
                {
                    ahead = Ahead::TooFar;
                    let (rescored, bytes_read) = (extra.rescored, extra.bytes_read);
                    (attended, extra) = sketches::attend(scan, wanted);
                    extra.rescored += rescored;
                    extra.bytes_read += bytes_read;
                }
                if ahead != Ahead::Used && begun {
                    self.blocks.usual.note(layer, kv_head, &extra.covered);
                }
                let escalated = extra.escalated;
                (HeadFound::Attend(attended, escalated), extra)
            }
        };
        if ahead != Ahead::No {
            let usual = &self.blocks.usual;
            usual.note_forecast(place.sketched.layer, place.kv_head, ahead == Ahead::Used);
        }
        Head {
            scanned: scan.keys_scanned(),
            late,
            // When it is late nothing was begun.
            missing: missing || !late && !begun,
            sketch: Some(extra),
            streaming: false,
            ahead,
            found,
        }
    }

    /// Begins with this search's queries; answers whether all blocks were added.
    fn begin_anew<'a>(&'a self, place: &HeadPlace<'a, '_>, scan: &mut SketchScan<'a>) -> bool {
        let begun = scan.begin(self.queries_of(place.kv_head), place.basis).is_ok();
        begun && self.add(place, scan)
    }

    /// Adds the blocks that are there; none where it is late.
    fn add<'a>(&'a self, place: &HeadPlace<'a, '_>, scan: &mut SketchScan<'a>) -> bool {
        let HeadPlace {
            kv_head,
            halves,
            sketched,
            excluded,
            ..
        } = *place;
        let Some(column) = sketched.blocks.column(kv_head).filter(|_| !self.is_late()) else {
            return false;
        };
        let layout = &self.layout;
        let segments = halves.iter().enumerate().map(|(at, halves)| {
            let halves = halves.filter(|_| sketched.blocks.has(at))?;
            Some(Segment {
                keys: &halves[layout.keys(kv_head)],
                values: &halves[layout.values(kv_head)],
                position: at * layout.block_tokens,
            })
        });
        let excluded = std::slice::from_ref(excluded);
        let beside = self.local_lse_of(kv_head).is_none_or(|lse| scan.beside(lse).is_ok());
        beside && scan.scan_column(column, segments, excluded).is_ok()
    }
}

/// Where one KV head is searched.
struct HeadPlace<'a, 'b> {
    kv_head: usize,
    basis: &'a HeadBasis,
    halves: &'b [Option<&'a [f16]>],
    sketched: &'a Sketched,
    excluded: &'a Excluded,
    /// Every block that is wanted is there.
    whole: bool,
}

impl Head {
    /// What a search that only finds candidates found.
    pub(super) fn parked(parked: Option<Box<Parked>>) -> Self {
        Self {
            scanned: 0,
            late: false,
            missing: false,
            sketch: None,
            streaming: false,
            ahead: Ahead::No,
            found: HeadFound::Parked(parked),
        }
    }
}

/// Attends to what is asked for, and to more where that leaves out more than is acceptable.
fn attend(scan: &FlatScan<'_>, target_mass: f32, k_max: Option<usize>, options: AttendOptions) -> HeadFound {
    let found = scan.attend(target_mass, k_max);
    let missed_max = options.missed_mass_max;
    let misses = |found: &Attended| missed_max > 0.0 && found.mass.iter().any(|mass| 1.0 - mass > missed_max);
    if !misses(&found) {
        return HeadFound::Attend(found, false);
    }
    // Every key is scored: the fewest that are enough are known, up to rounding.
    let more = scan.attend((1.0 - missed_max).max(target_mass), None);
    let more = if misses(&more) { scan.attend(1.0, None) } else { more };
    HeadFound::Attend(more, true)
}

/// Copies chosen rows out of their blocks: they travel, the blocks stay.
pub(super) fn gather(
    positions: &[u32],
    head_dim: usize,
    each_row: impl FnOnce(&mut dyn FnMut(&[f16], &[f16])),
) -> HeadRows {
    let bytes = positions.len() * head_dim * Dtype::F16.bytes();
    let (mut keys, mut values) = (BytesMut::with_capacity(bytes), BytesMut::with_capacity(bytes));
    each_row(&mut |key, value| {
        key.iter().for_each(|half| keys.put_u16_le(half.to_bits()));
        value.iter().for_each(|half| values.put_u16_le(half.to_bits()));
    });
    HeadRows {
        positions: positions.to_vec(),
        keys: keys.freeze(),
        values: values.freeze(),
    }
}
