//! Processor time of processes, as the kernel counts it.

use std::time::Duration;

/// Ticks per second in `/proc/<pid>/stat`: `USER_HZ`, 100 on every Linux architecture that we build for.
const TICKS: f64 = 100.0;

/// User and system time that a process has used so far; `None` where there is no such process or no `/proc`.
pub(in crate::bench) fn processor_time(pid: u32) -> Option<Duration> {
    parse(&std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
}

/// Fields 14 and 15 (proc_pid_stat(5)), counted behind the command's name, which may hold spaces.
fn parse(stat: &str) -> Option<Duration> {
    let behind = stat.rsplit_once(')')?.1;
    let mut fields = behind.split_ascii_whitespace().skip(11);
    let user: f64 = fields.next()?.parse().ok()?;
    let system: f64 = fields.next()?.parse().ok()?;
    Some(Duration::from_secs_f64((user + system) / TICKS))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_found_behind_any_name() {
        let line = "12 (a (b) c) S 1 12 12 0 -1 4194560 100 0 0 0 250 50 0 0 20 0 1 0 100 1000 10";
        assert_eq!(parse(line), Some(Duration::from_secs(3)));
        for broken in ["", "12 (a) S", "12 a S 1 1 1"] {
            assert_eq!(parse(broken), None, "{broken}");
        }
        assert!(processor_time(std::process::id()).is_some());
    }
}
