//! Noise, and pages on their way to the host and back.

use kvasir_cuda::{Dtype, Gpu, GpuError, Inbound, Landed, Outbound, noise, reference};
use rand::{Rng, rngs::StdRng, seq::SliceRandom};

use crate::check::Tally;

/// Every number, of both types.
pub(crate) fn noises(gpu: &Gpu, rng: &mut StdRng, cases: usize, tally: &mut Tally) -> Result<(), GpuError> {
    for _ in 0..cases {
        let dtype = [Dtype::Bf16, Dtype::F16][rng.random_range(0..2)];
        let (len, seed, most) = (
            2 * rng.random_range(0..40_000),
            rng.random(),
            rng.random_range(0.001..1000.0),
        );
        let mut found = gpu.upload(&vec![0xffffu16; len])?;
        noise(gpu, dtype, &mut found, seed, most)?;
        let expected = reference::noise(len, seed, most).into_iter().map(|x| match dtype {
            Dtype::Bf16 => half::bf16::from_f32(x).to_bits(),
            _ => half::f16::from_f32(x).to_bits(),
        });
        let wrong = found
            .download()?
            .into_iter()
            .zip(expected)
            .filter(|(a, b)| a != b)
            .count();
        tally.count(wrong as f64, 0.0, || {
            format!("noise of {len} {dtype:?}, seed {seed}, {most}")
        });
    }
    Ok(())
}

/// Pages land whole, as they were when they were sent, and stay while anybody reads them: whatever is written to the pages
/// or sent after them, and in however little memory.
pub(crate) fn sent(gpu: &Gpu, rng: &mut StdRng, cases: usize, tally: &mut Tally) -> Result<(), GpuError> {
    const MOST: usize = 4 << 20;
    let mut outbound = Outbound::new(gpu, MOST)?;
    let mut kept: Vec<(Landed, Vec<u8>)> = Vec::new();
    for case in 0..cases {
        let page_bytes = 16 * rng.random_range(1..3000usize);
        let pages = rng.random_range(1..60usize);
        let mut numbers: Vec<u32> = (0..pages as u32).collect();
        numbers.shuffle(rng);
        numbers.truncate(rng.random_range(1..=pages));
        let fit = (MOST / 2 / page_bytes).min(numbers.len());
        let begun = outbound.begin(&numbers, page_bytes)?;
        numbers.truncate(begun);
        let describe = || format!("{} pages of {page_bytes} bytes, case {case}", numbers.len());
        tally.count(f64::from(u8::from(begun != fit)), 0.0, || {
            format!("room for {}", describe())
        });
        // Two layers at a time are on their way at most times.
        let mut under_way = Vec::new();
        for _ in 0..4 {
            let bytes: Vec<u8> = (0..pages * page_bytes).map(|_| rng.random()).collect();
            let mut buffer = gpu.upload(&bytes)?;
            let sent = outbound.send(&buffer)?;
            // What comes behind it may write the pages.
            buffer.fill(0xee)?;
            match sent {
                Some(sent) => under_way.push((sent, bytes)),
                None => {
                    // All of the memory is read: true only if much of it is.
                    let held = kept.len() + under_way.len();
                    tally.count(f64::from(u8::from(held == 0)), 0.0, || {
                        format!("no room for {}", describe())
                    });
                    kept.clear();
                    under_way.clear();
                }
            }
        }
        for (sent, bytes) in under_way {
            for (place, &number) in numbers.iter().enumerate() {
                let landed = sent.page(place)?;
                let expected = &bytes[number as usize * page_bytes..][..page_bytes];
                let wrong = f64::from(u8::from(landed.as_ref() != expected));
                tally.count(wrong, 0.0, || format!("page {number} of {}", describe()));
                if kept.len() < 20 && rng.random_bool(0.02) {
                    kept.push((landed, expected.to_vec()));
                }
            }
            let outside = sent.page(numbers.len()).is_err();
            tally.count(f64::from(u8::from(!outside)), 0.0, || {
                format!("a page behind {}", describe())
            });
        }
        for (landed, expected) in &kept {
            let wrong = f64::from(u8::from(landed.as_ref() != expected));
            tally.count(wrong, 0.0, || format!("a page that was kept, in case {case}"));
        }
        if rng.random_bool(0.2) {
            kept.clear();
        }
    }
    Ok(())
}

/// What is sent to the device is there once the main stream has been joined, in however small a ring; what does not fit is refused.
pub(crate) fn received(gpu: &Gpu, rng: &mut StdRng, cases: usize, tally: &mut Tally) -> Result<(), GpuError> {
    for case in 0..cases {
        let (places, place_bytes) = (rng.random_range(1..40usize), rng.random_range(1..20_000usize));
        let mut inbound = Inbound::new(gpu, places, place_bytes)?;
        let pages = rng.random_range(1..60usize);
        let mut expected = vec![0u8; pages * place_bytes];
        let mut buffer = gpu.upload(&expected)?;
        // Some rounds, so that places are used again while their last bytes may be on their way.
        for _ in 0..rng.random_range(1..5) {
            for _ in 0..rng.random_range(0..3 * places) {
                let len = rng.random_range(1..=place_bytes);
                let bytes: Vec<u8> = (0..len).map(|_| rng.random()).collect();
                let at = rng.random_range(0..pages) * place_bytes;
                inbound.send(&mut buffer, at, &bytes)?;
                expected[at..at + len].copy_from_slice(&bytes);
            }
            inbound.join()?;
            let wrong = f64::from(u8::from(buffer.download()? != expected));
            tally.count(wrong, 0.0, || {
                format!("{pages} pages through {places} places of {place_bytes} bytes, case {case}")
            });
        }
        let long = inbound.send(&mut buffer, 0, &vec![1; place_bytes + 1]).is_err();
        let outside = inbound.send(&mut buffer, pages * place_bytes, &[1]).is_err();
        tally.count(f64::from(u8::from(!long || !outside)), 0.0, || {
            format!("what does not fit, case {case}")
        });
    }
    Ok(())
}
