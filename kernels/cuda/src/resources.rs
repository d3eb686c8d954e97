//! What the compiler says about each kernel: registers, spills, stack.

/// Resources of one compiled kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resources {
    /// Name of the kernel.
    pub kernel: String,
    /// Registers per thread.
    pub registers: u32,
    /// Bytes of stack per thread: an array that was indexed at run time, or a call.
    pub stack_bytes: u32,
    /// Bytes stored to and loaded from local memory because registers ran out.
    pub spill_bytes: u32,
}

impl Resources {
    /// Reads the report that ptxas writes with `-v`, one entry per kernel.
    pub fn parse(log: &str) -> Vec<Self> {
        let mut out: Vec<Self> = Vec::new();
        for line in log.lines() {
            if let Some((_, rest)) = line.split_once("Compiling entry function '") {
                out.push(Self {
                    kernel: rest.split('\'').next().unwrap_or_default().to_owned(),
                    registers: 0,
                    stack_bytes: 0,
                    spill_bytes: 0,
                });
            }
            let Some(last) = out.last_mut() else { continue };
            let before = |what: &str| {
                let (head, _) = line.split_once(what)?;
                head.split_whitespace().last()?.parse::<u32>().ok()
            };
            if let Some(bytes) = before(" bytes stack frame") {
                last.stack_bytes = last.stack_bytes.max(bytes);
            }
            for kind in [" bytes spill stores", " bytes spill loads"] {
                last.spill_bytes += before(kind).unwrap_or(0);
            }
            if let Some(registers) = before(" registers") {
                last.registers = registers;
            }
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_compilers_report() {
        let log = "ptxas info    : 20 bytes gmem\nptxas info    : Compiling entry function 'k' for 'sm_90a'\n\
                   ptxas info    : Function properties for k\n\
                   ptxas         .     16 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads\n\
                   ptxas info    : Used 14 registers, used 0 barriers\n\
                   ptxas info    : Compiling entry function 'm' for 'sm_90a'\n\
                   ptxas         .     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n\
                   ptxas info    : Used 255 registers, used 1 barriers\n";
        let entry = |kernel: &str, registers, stack_bytes, spill_bytes| Resources {
            kernel: kernel.into(),
            registers,
            stack_bytes,
            spill_bytes,
        };
        assert_eq!(Resources::parse(log), [entry("k", 14, 16, 12), entry("m", 255, 0, 0)]);
        assert_eq!(Resources::parse("nothing here"), []);
    }
}
