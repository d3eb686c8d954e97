//! What a thread that works in the background asks of the system.

use std::{io, time::Duration};

use rustix::{
    process::setpriority_process,
    thread::gettid,
    time::{ClockId, clock_gettime},
};

/// The lowest there is: about 1.5 % of a processor that a thread of ordinary priority wants too.
const NICE: i32 = 19;

/// Gives the calling thread the lowest priority: it runs on processors that nobody else wants.
///
/// # Errors
/// What the system says; the thread then goes on with the priority that it has.
pub fn lower_priority() -> io::Result<()> {
    // On Linux a priority belongs to a thread, which is named by its number like a process.
    Ok(setpriority_process(Some(gettid()), NICE)?)
}

/// Processor time that the calling thread has used.
pub fn cpu_time() -> Duration {
    let used = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(
        u64::try_from(used.tv_sec).unwrap_or(0),
        u32::try_from(used.tv_nsec).unwrap_or(0),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_calling_thread_steps_back() {
        let before = rustix::process::getpriority_process(None).expect("a priority");
        let lowered = std::thread::spawn(|| {
            lower_priority().expect("anyone may step back");
            rustix::process::getpriority_process(Some(gettid())).expect("a priority")
        });
        assert_eq!(lowered.join().expect("no panic"), NICE);
        assert_eq!(rustix::process::getpriority_process(None).expect("a priority"), before);
    }

    #[test]
    fn time_is_that_of_work_done() {
        let begun = cpu_time();
        let mut sum = 0_u64;
        while cpu_time() == begun {
            sum = std::hint::black_box(sum.wrapping_add(1));
        }
        assert!(cpu_time() > begun);
    }
}
