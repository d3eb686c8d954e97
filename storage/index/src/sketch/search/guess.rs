//! What a sample of a column's keys says before a scan: from which level on a head's candidates begin, how far below it the centroids
//! of their groups lie, and where the scores of what they leave.

use kvasir_simd::Level;

use super::{Kind, Masks, Room, SHORT, Table};
use crate::sketch::column::Column;

/// One in so many keys is few.
const FEW: usize = 100;
/// Of the best keys of a sample, or of as many as are wanted where that is more, it is known how far below them their centroids lie.
const GAP_OF: f64 = 0.03;

/// Where the scores by sketch of the keys that are no candidates lie, in powers of two above those that their means stand for.
#[derive(Clone, Copy, Debug, Default)]
pub(in crate::sketch) struct Lean {
    /// Variance of all searched keys; 0 where nothing is known.
    pub(in crate::sketch) variance: f32,
    /// Mean of those below the floor, by weight.
    pub(super) away: f64,
    /// Sum of weights times scores, of what candidates leave.
    pub(in crate::sketch) left: f64,
}

impl Table {
    /// Floors of all heads, gaps of groups below them, and where scores lie.
    pub(super) fn guess(&mut self, column: &Column, masks: &Masks, wanted: &[(usize, f32)], room: &mut Room) {
        let heads = self.heads();
        room.floors.clear();
        room.first.gaps.clear();
        room.first.excess.clear();
        room.sample.take(column, masks);
        room.few = true;
        let learnt = !column.slopes().is_empty();
        self.leans.clear();
        self.centres
            .resize(if learnt { heads * self.runs } else { 0 }, Level(0));
        for (head, &(count, mass)) in wanted.iter().enumerate() {
            let sequence = masks.sequence(head, heads);
            let searched = masks.searched.get(sequence).copied().unwrap_or(0);
            room.few &= count <= searched / FEW;
            let mut gap = (0, 1.0);
            let floor = match self.kinds[head] {
                _ if count == 0 || searched == 0 => Level(u16::MAX),
                Kind::Dead => Level(u16::MAX),
                Kind::Exact => Level::LOWEST,
                Kind::Sketched if count >= searched && mass >= 1.0 => Level::LOWEST,
                Kind::Sketched => {
                    room.sample.look(&self.coded, head, masks, sequence);
                    let share = count as f64 / searched as f64;
                    let floors = room.sample.floors([share, share.max(GAP_OF)]);
                    gap.0 = u16::MAX;
                    if column.clustered_groups() > SHORT {
                        gap = room.sample.gap(room.first.levels(head), floors);
                    }
                    floors[0]
                }
            };
            room.floors.push(floor);
            room.first.gaps.push(gap.0);
            room.first.excess.push(gap.1);
            if learnt {
                let centres = &mut self.centres[head * self.runs..][..self.runs];
                self.leans.push(match self.kinds[head] {
                    Kind::Sketched if searched > 0 => {
                        room.sample.look(&self.coded, head, masks, sequence);
                        room.sample.lean(room.first.levels(head), floor, centres)
                    }
                    _ => Lean::default(),
                });
            }
        }
    }
}
