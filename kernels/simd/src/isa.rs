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
    /// AVX-512 F, BW, DQ, VL and VNNI (and BMI1 and POPCNT, which no processor with them lacks).
    Avx512 = 3,
}

/// 0 while nothing was detected, else an [`Isa`].
static ACTIVE: AtomicU8 = AtomicU8::new(0);

impl Isa {
    /// The widest set this processor has.
    pub fn detect() -> Self {
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 =
                is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c");
            let avx512 = is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl")
                && is_x86_feature_detected!("avx512vnni")
                && is_x86_feature_detected!("bmi1")
                && is_x86_feature_detected!("popcnt");
            match (avx2, avx512) {
                (true, true) => return Self::Avx512,
                (true, false) => return Self::Avx2,
                (false, _) => {}
            }
        }
        Self::Scalar
    }

    /// All sets this processor has, narrowest first.
    pub fn available() -> impl Iterator<Item = Self> {
        let widest = Self::detect();
        [Self::Scalar, Self::Avx2, Self::Avx512]
            .into_iter()
            .filter(move |isa| *isa <= widest)
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
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma,f16c")]
            fn avx2($($arg: $ty),*) $(-> $out)? {
                $generic($crate::lanes::Avx2::new(), $($arg),*)
            }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
            fn avx512($($arg: $ty),*) $(-> $out)? {
                $generic($crate::lanes::Avx512::new(), $($arg),*)
            }
            match isa {
                // SAFETY: kernels get their `Isa` from `Isa::active` or `Isa::available`, which name detected sets only.
                #[cfg(target_arch = "x86_64")]
                $crate::isa::Isa::Avx512 => unsafe { avx512($($arg),*) },
                // SAFETY: as above.
                #[cfg(target_arch = "x86_64")]
                $crate::isa::Isa::Avx2 => unsafe { avx2($($arg),*) },
                _ => $generic($crate::lanes::Scalar, $($arg),*),
            }
        }
    };
}
pub(crate) use dispatched;
