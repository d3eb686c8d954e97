//! What the kernel counts about a process: processor time, memory, bytes written to disks.

use std::time::Duration;

use serde::Serialize;

/// Ticks per second in `/proc/<pid>/stat`: `USER_HZ`, 100 on every Linux architecture that we build for.
const TICKS: f64 = 100.0;

/// Memory that a process has resident, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub(in crate::bench) struct Resident {
    /// All of it.
    pub(in crate::bench) bytes: u64,
    /// The part that is shared memory, as a host tier in an arena is.
    pub(in crate::bench) shared_bytes: u64,
}

/// User and system time that a process has used so far; `None` where there is no such process or no `/proc`.
pub(in crate::bench) fn processor_time(pid: u32) -> Option<Duration> {
    parse_time(&read(pid, "stat")?)
}

/// What it has resident now.
pub(in crate::bench) fn resident(pid: u32) -> Option<Resident> {
    parse_resident(&read(pid, "status")?)
}

/// Bytes that it has caused to be written to disks so far; `None` also for a process of another user.
pub(in crate::bench) fn written_bytes(pid: u32) -> Option<u64> {
    parse_written(&read(pid, "io")?)
}

fn read(pid: u32, file: &str) -> Option<String> {
    std::fs::read_to_string(format!("/proc/{pid}/{file}")).ok()
}

/// Fields 14 and 15 (proc_pid_stat(5)), counted behind the command's name, which may hold spaces.
fn parse_time(stat: &str) -> Option<Duration> {
    let behind = stat.rsplit_once(')')?.1;
    let mut fields = behind.split_ascii_whitespace().skip(11);
    let user: f64 = fields.next()?.parse().ok()?;
    let system: f64 = fields.next()?.parse().ok()?;
    Some(Duration::from_secs_f64((user + system) / TICKS))
}

/// `VmRSS` and `RssShmem` (proc_pid_status(5)).
fn parse_resident(status: &str) -> Option<Resident> {
    let bytes = |name: &str| -> Option<u64> {
        let value = status.lines().find_map(|line| line.strip_prefix(name))?;
        let kib: u64 = value.trim().strip_suffix("kB")?.trim().parse().ok()?;
        Some(kib << 10)
    };
    Some(Resident {
        bytes: bytes("VmRSS:")?,
        shared_bytes: bytes("RssShmem:").unwrap_or(0),
    })
}

/// `write_bytes` (proc_pid_io(5)).
fn parse_written(io: &str) -> Option<u64> {
    let value = io.lines().find_map(|line| line.strip_prefix("write_bytes:"))?;
    value.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_found_behind_any_name() {
        let line = "12 (a (b) c) S 1 12 12 0 -1 4194560 100 0 0 0 250 50 0 0 20 0 1 0 100 1000 10";
        assert_eq!(parse_time(line), Some(Duration::from_secs(3)));
        for broken in ["", "12 (a) S", "12 a S 1 1 1"] {
            assert_eq!(parse_time(broken), None, "{broken}");
        }
    }

    #[test]
    fn memory_and_writes_are_found() {
        let status = "Name:\tkvasir\nVmRSS:\t    2048 kB\nRssAnon:\t 1 kB\nRssShmem:\t    1024 kB\n";
        let resident = Resident {
            bytes: 2 << 20,
            shared_bytes: 1 << 20,
        };
        assert_eq!(parse_resident(status), Some(resident));
        assert_eq!(parse_resident("VmRSS: many kB\n"), None);
        assert_eq!(
            parse_written("rchar: 1\nwrite_bytes: 4096\ncancelled_write_bytes: 7\n"),
            Some(4096)
        );
        assert_eq!(parse_written("rchar: 1\n"), None);
    }

    #[test]
    fn this_process_has_all_of_them() {
        let own = std::process::id();
        assert!(processor_time(own).is_some());
        assert!(resident(own).is_some_and(|resident| resident.bytes > resident.shared_bytes));
        assert!(written_bytes(own).is_some());
    }
}
