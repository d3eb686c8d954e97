//! Which instructions the kernels use.

use std::sync::atomic::{AtomicU8, Ordering};

/// An instruction set the kernels are written for, narrowest first. Results have equal bits on all.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Isa {
    /// Plain Rust.
    Scalar = 1,
    /// AVX2 with FMA and F16C.
    Avx2 = 2,
    /// AVX-512 F, BW, DQ, VL and VNNI.
    Avx512 = 3,
}

/// 0 while nothing was detected, else an [`Isa`].
static ACTIVE: AtomicU8 = AtomicU8::new(0);

impl Isa {
    /// The widest set this processor has.
    pub fn detect() -> Self {
        Self::Scalar
    }

    /// The set in use: what [`Isa::detect`] found, unless [`Isa::limit`] lowered it.
    pub fn active() -> Self {
        match ACTIVE.load(Ordering::Relaxed) {
            1 => Self::Scalar,
            2 => Self::Avx2,
            3 => Self::Avx512,
            _ => {
                let found = Self::detect();
                ACTIVE.store(found as u8, Ordering::Relaxed);
                found
            }
        }
    }

    /// Uses at most `isa` from now on in the whole process, and returns what is in use. Results keep their bits.
    pub fn limit(isa: Self) -> Self {
        let isa = isa.min(Self::detect());
        ACTIVE.store(isa as u8, Ordering::Relaxed);
        isa
    }
}

/// Defines `fn name(isa, arguments..)` that runs `generic(lanes, arguments..)` compiled for `isa`.
macro_rules! dispatched {
    ($(#[$meta:meta])* $vis:vis fn $name:ident($($arg:ident: $ty:ty),* $(,)?) $(-> $out:ty)? = $generic:ident) => {
        $(#[$meta])*
        $vis fn $name(isa: $crate::isa::Isa, $($arg: $ty),*) $(-> $out)? {
            match isa {
                _ => $generic($crate::lanes::Scalar, $($arg),*),
            }
        }
    };
}
pub(crate) use dispatched;
