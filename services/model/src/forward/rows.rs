//! Loops over rows, shared by the threads of a pool.

use kvasir_simd::Pool;
use parking_lot::Mutex;

/// Rows a task takes: enough to be worth a wake-up.
const ROWS_PER_TASK: usize = 16;

/// Runs `task(first row, rows of each buffer)` over all rows of `buffers`, given as `(rows, width)` with the same number
/// of rows. A few rows are worked on right here.
pub(super) fn for_rows<const N: usize>(
    threads: &Pool,
    buffers: [(&mut [f32], usize); N],
    task: &(dyn Fn(usize, [&mut [f32]; N]) + Sync),
) {
    let rows = buffers
        .iter()
        .map(|(buffer, width)| buffer.len() / width)
        .max()
        .unwrap_or(0);
    if rows <= ROWS_PER_TASK || threads.threads() == 1 {
        task(0, buffers.map(|(buffer, _)| buffer));
        return;
    }
    let mut chunks = buffers.map(|(buffer, width)| buffer.chunks_mut(ROWS_PER_TASK * width));
    // Each is locked once, by the task that owns its rows.
    let parts: Vec<_> = (0..rows.div_ceil(ROWS_PER_TASK))
        .map(|_| Mutex::new(chunks.each_mut().map(|chunks| chunks.next().unwrap_or_default())))
        .collect();
    threads.run(parts.len(), &|index| {
        let mut part = parts[index].lock();
        task(index * ROWS_PER_TASK, part.each_mut().map(|rows| &mut **rows));
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_is_visited_once_with_its_number() {
        for rows in [0, 1, 15, 16, 17, 100] {
            let (mut a, mut b) = (vec![0.0; rows * 3], vec![0.0; rows]);
            for_rows(&Pool::new(2), [(&mut a, 3), (&mut b, 1)], &|first, [a, b]| {
                for (row, (a, b)) in (first..).zip(a.chunks_exact_mut(3).zip(b)) {
                    a.iter_mut().for_each(|a| *a += row as f32);
                    *b += 1.0;
                }
            });
            assert_eq!(a, (0..rows * 3).map(|i| (i / 3) as f32).collect::<Vec<_>>());
            assert_eq!(b, vec![1.0; rows]);
        }
    }
}
