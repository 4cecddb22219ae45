//! Who this process is: read from what torchrun, Kubeflow, Slurm, OpenMPI or our own launcher puts into the environment.

use std::net::IpAddr;
use std::ops::RangeInclusive;

use sha2::{Digest, Sha256};

use super::handshake::Secret;
use super::secret::{SECRET, Source};
use dpo_core::error::{Error, Result};

/// This process's place among the ranks of a run.
#[derive(Clone, Debug, PartialEq)]
pub struct Place {
    /// From 0 to below `size`.
    pub rank: usize,
    /// Ranks of the run, 2 or more.
    pub size: usize,
    /// Rank among those of this host.
    pub local_rank: usize,
    /// Ranks on this host, where that is known.
    pub local_size: Option<usize>,
    /// Times the run was started before; a run that is started again goes on from its last checkpoint.
    pub attempt: u64,
    /// Whether our own launcher started this process.
    pub launched: bool,
    /// What tells ranks of this attempt from those of the one before: the attempt, but torchrun counts restarts by machine
    /// and takes another port for each.
    pub(super) generation: u64,
    /// Rank 0's host.
    pub(super) host: String,
    /// Where rank 0 listens: on the first of these ports that is free.
    pub(super) ports: RangeInclusive<u16>,
    pub(super) secret: Source,
    /// The variable that moves the port.
    pub(super) port_variable: &'static str,
}

/// The names a launcher gives to what a rank has to know.
struct Launcher {
    name: &'static str,
    rank: &'static str,
    /// The first that is set counts.
    size: &'static [&'static str],
    local_rank: &'static str,
    local_size: &'static str,
    /// Hosts of the run, where there is a variable for it.
    hosts: Option<&'static str>,
    /// Set for every rank; together they tell runs apart.
    run: &'static [&'static str],
    /// Without this variable the others do not make a rank: a shell inside an allocation has them too.
    only_with: Option<&'static str>,
}

const LAUNCHERS: &[Launcher] = &[
    Launcher {
        name: "torchrun",
        rank: "RANK",
        size: &["WORLD_SIZE"],
        local_rank: "LOCAL_RANK",
        local_size: "LOCAL_WORLD_SIZE",
        hosts: None,
        run: &["TORCHELASTIC_RUN_ID"],
        only_with: None,
    },
    Launcher {
        name: "Slurm",
        rank: "SLURM_PROCID",
        size: &["SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"],
        local_rank: "SLURM_LOCALID",
        local_size: "SLURM_NTASKS_PER_NODE",
        hosts: Some("SLURM_STEP_NUM_NODES"),
        run: &["SLURM_JOB_ID", "SLURM_STEP_ID"],
        only_with: Some("SLURM_STEP_ID"),
    },
    Launcher {
        name: "OpenMPI",
        rank: "OMPI_COMM_WORLD_RANK",
        size: &["OMPI_COMM_WORLD_SIZE"],
        local_rank: "OMPI_COMM_WORLD_LOCAL_RANK",
        local_size: "OMPI_COMM_WORLD_LOCAL_SIZE",
        hosts: None,
        run: &["PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid"],
        only_with: None,
    },
];

/// How often a run was started again: by our launcher, by torchrun, by a queue that put the job back.
const ATTEMPTS: &[&str] = &[ATTEMPT, "TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"];

/// Set by our own launcher: the number of the attempt.
pub(super) const ATTEMPT: &str = "DPO_HOST_ATTEMPT";
/// Set by our own launcher, which holds a leash.
pub(super) const LAUNCHED: &str = "DPO_HOST_LAUNCHED";

/// Steps of this number and above are Slurm's own: batch scripts, interactive shells.
const SLURM_OWN_STEPS: u64 = 0xffff_fff0;

/// torchrun's own store listens on MASTER_PORT; the next ports are ours.
const TORCHRUN_PORTS: u16 = 8;

impl Place {
    /// The place that this process's environment names; `None` for a process on its own.
    ///
    /// # Errors
    /// Variables that are set by half, or make no sense.
    pub fn from_environment() -> Result<Option<Place>> {
        Place::of(|name| std::env::var(name).ok().filter(|v| !v.is_empty()))
    }

    /// Whether a stranger could pass for a rank, since the secret can be guessed.
    pub fn is_guessable(&self) -> bool {
        matches!(self.secret, Source::Guessable(_))
    }

    /// Whether ranks meet where only this host's processes can.
    pub(super) fn on_loopback(&self) -> bool {
        is_loopback(&self.host)
    }

    fn of(get: impl Fn(&str) -> Option<String>) -> Result<Option<Place>> {
        let Some(launcher) = LAUNCHERS.iter().find(|l| l.started(&get)) else { return Ok(None) };
        let size_name = launcher.size.iter().find(|n| get(n).is_some()).unwrap_or(&launcher.size[0]);
        let Some(size) = number(&get, size_name)? else { return Err(missing(launcher.rank, size_name)) };
        if size == 1 {
            return Ok(None);
        }
        let Some(rank) = number(&get, launcher.rank)? else { return Err(missing(size_name, launcher.rank)) };
        if rank >= size {
            return Err(Error::input(format!("is {rank}, {size_name} is {size}"))
                .at(launcher.rank)
                .help("ranks count from 0"));
        }
        let local_size = number(&get, launcher.local_size)?;
        let run: Vec<String> = launcher.run.iter().filter_map(|n| get(n)).collect();
        let host = launcher.host(&get, local_size == Some(size))?;
        let (ports, port_variable) = launcher.ports(&get, &run.concat())?;
        // What all ranks of the run have, and no other run has.
        let shared = format!("{} {run:?} {host} {ports:?} {size}", launcher.name);
        let on_one_host = is_loopback(&host) || local_size == Some(size) || launcher.has_one_host(&get)?;
        let secret = match get(SECRET) {
            Some(given) => Source::Given(Secret::new(given.as_bytes())),
            None if on_one_host => Source::file(&shared),
            None => Source::Guessable(Secret::new(shared.as_bytes())),
        };
        let attempt = ATTEMPTS.iter().find(|n| get(n).is_some()).map(|n| number(&get, n)).transpose()?.flatten();
        let attempt = attempt.unwrap_or(0) as u64;
        Ok(Some(Place {
            rank,
            size,
            local_rank: number(&get, launcher.local_rank)?.unwrap_or(0),
            local_size,
            attempt,
            generation: if get("TORCHELASTIC_RUN_ID").is_some() { 0 } else { attempt },
            launched: get(LAUNCHED).is_some(),
            secret,
            host,
            ports,
            port_variable,
        }))
    }
}

impl Launcher {
    fn started(&self, get: &impl Fn(&str) -> Option<String>) -> bool {
        match self.only_with.map(get) {
            Some(None) => return false,
            Some(Some(step)) if step.parse::<u64>().is_ok_and(|s| s >= SLURM_OWN_STEPS) => return false,
            _ => {}
        }
        // Slurm sets the number of tasks in a shell as well; who has no rank there is none.
        get(self.rank).is_some() || (self.only_with.is_none() && self.size.iter().any(|n| get(n).is_some()))
    }

    fn has_one_host(&self, get: &impl Fn(&str) -> Option<String>) -> Result<bool> {
        Ok(self.hosts.map(|name| number(get, name)).transpose()?.flatten() == Some(1))
    }

    fn host(&self, get: &impl Fn(&str) -> Option<String>, all_here: bool) -> Result<String> {
        if let Some(host) = get("MASTER_ADDR") {
            return Ok(host);
        }
        let nodes = ["SLURM_STEP_NODELIST", "SLURM_NODELIST", "SLURM_JOB_NODELIST"].iter().find_map(|n| get(n));
        match (self.name, nodes) {
            ("Slurm", Some(nodes)) => first_host(&nodes).ok_or_else(|| {
                Error::input(format!("'{nodes}' names no host")).at("SLURM_NODELIST").help("set MASTER_ADDR")
            }),
            ("Slurm", None) => Err(missing(self.rank, "SLURM_NODELIST")),
            ("OpenMPI", _) if all_here => Ok("127.0.0.1".into()),
            _ => Err(missing(self.rank, "MASTER_ADDR")),
        }
    }

    fn ports(&self, get: &impl Fn(&str) -> Option<String>, run: &str) -> Result<(RangeInclusive<u16>, &'static str)> {
        let given = number(get, "MASTER_PORT")?.map(|port| {
            u16::try_from(port)
                .ok()
                .filter(|p| *p > 0)
                .ok_or_else(|| Error::input(format!("{port} should be from 1 to {}", u16::MAX)).at("MASTER_PORT"))
        });
        match given.transpose()? {
            Some(port) if get("TORCHELASTIC_RUN_ID").is_some() => {
                Ok((port.saturating_add(1)..=port.saturating_add(TORCHRUN_PORTS), "torchrun's --master-port"))
            }
            Some(port) => Ok((port..=port, "MASTER_PORT")),
            None if self.name == "torchrun" => Err(missing(self.rank, "MASTER_PORT")),
            None => {
                let hash = Sha256::digest(run);
                let port = 20_000 + u16::from_le_bytes([hash[0], hash[1]]) % 10_000;
                Ok((port..=port, "MASTER_PORT"))
            }
        }
    }
}

fn is_loopback(host: &str) -> bool {
    host == "localhost" || host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

fn missing(set: &str, name: &str) -> Error {
    Error::input(format!("is not set, but {set} is"))
        .at(name)
        .help(format!("set it for every rank, or unset {set} to run on one device"))
}

fn number(get: &impl Fn(&str) -> Option<String>, name: &str) -> Result<Option<usize>> {
    let Some(text) = get(name) else { return Ok(None) };
    text.trim().parse().map(Some).map_err(|_| Error::input(format!("'{text}' should be a whole number")).at(name))
}

/// `node3` of `node[3-5,7],other`, `a` of `a,b`.
fn first_host(nodes: &str) -> Option<String> {
    let end = nodes.find([',', '[']).unwrap_or(nodes.len());
    let (head, rest) = nodes.split_at(end);
    let Some(inside) = rest.strip_prefix('[') else { return (!head.is_empty()).then(|| head.into()) };
    let (inside, after) = inside.split_once(']')?;
    let first = inside.split([',', '-']).next().filter(|n| !n.is_empty())?;
    // What follows the bracket belongs to the name, up to the next host, and may hold brackets itself.
    let tail = if after.is_empty() || after.starts_with(',') { String::new() } else { first_host(after)? };
    Some(format!("{head}{first}{tail}"))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)] // In a test, a panic is the report.
mod tests {
    use super::*;

    fn place(variables: &str) -> Result<Option<Place>> {
        let set: Vec<(&str, &str)> = variables.split_whitespace().filter_map(|v| v.split_once('=')).collect();
        Place::of(|name| set.iter().find(|(n, _)| *n == name).map(|(_, v)| (*v).to_owned()))
    }

    /// Variables; then rank, size, local rank, address and first port of what they mean.
    const MEANT: &[(&str, [usize; 3], &str, u16)] = &[
        ("RANK=1 WORLD_SIZE=4 LOCAL_RANK=1 MASTER_ADDR=h MASTER_PORT=29500", [1, 4, 1], "h", 29500),
        ("RANK=1 WORLD_SIZE=2 MASTER_ADDR=pod-0 MASTER_PORT=23456", [1, 2, 0], "pod-0", 23456),
        (
            "RANK=3 WORLD_SIZE=4 LOCAL_RANK=1 MASTER_ADDR=h MASTER_PORT=29500 TORCHELASTIC_RUN_ID=none",
            [3, 4, 1],
            "h",
            29501,
        ),
        (
            "SLURM_PROCID=5 SLURM_NTASKS=8 SLURM_LOCALID=1 SLURM_STEP_ID=0 SLURM_NODELIST=node[03-05,7] MASTER_PORT=9",
            [5, 8, 1],
            "node03",
            9,
        ),
        (
            "OMPI_COMM_WORLD_RANK=1 OMPI_COMM_WORLD_SIZE=2 OMPI_COMM_WORLD_LOCAL_RANK=1 OMPI_COMM_WORLD_LOCAL_SIZE=2 \
             MASTER_PORT=9",
            [1, 2, 1],
            "127.0.0.1",
            9,
        ),
        // Inside an allocation of Slurm, torchrun counts.
        (
            "SLURM_PROCID=0 SLURM_NTASKS=1 SLURM_STEP_ID=0 RANK=2 WORLD_SIZE=3 MASTER_ADDR=h MASTER_PORT=7",
            [2, 3, 0],
            "h",
            7,
        ),
    ];

    #[test]
    fn launchers_are_understood() {
        for (variables, [rank, size, local], host, port) in MEANT {
            let place = place(variables).unwrap().unwrap();
            assert_eq!([place.rank, place.size, place.local_rank], [*rank, *size, *local], "{variables}");
            assert_eq!((place.host.as_str(), *place.ports.start()), (*host, *port), "{variables}");
        }
    }

    #[test]
    fn processes_on_their_own() {
        for variables in [
            "",
            "WORLD_SIZE=1",
            "RANK=0 WORLD_SIZE=1",
            "SLURM_NTASKS=4 SLURM_JOB_ID=1",
            "SLURM_NTASKS=4 SLURM_JOB_ID=1 SLURM_PROCID=0",
            "SLURM_NTASKS=4 SLURM_JOB_ID=1 SLURM_PROCID=0 SLURM_STEP_ID=4294967290",
            "SLURM_NTASKS=4 SLURM_STEP_NUM_TASKS=1 SLURM_PROCID=0 SLURM_STEP_ID=0",
            "SLURM_NTASKS=1 SLURM_PROCID=0 SLURM_STEP_ID=0",
        ] {
            assert_eq!(place(variables).unwrap(), None, "{variables}");
        }
    }

    #[test]
    fn what_is_missing_is_named() {
        for (variables, name) in [
            ("RANK=0", "WORLD_SIZE: "),
            ("WORLD_SIZE=2", "RANK: "),
            ("RANK=0 WORLD_SIZE=2", "MASTER_ADDR: "),
            ("RANK=0 WORLD_SIZE=2 MASTER_ADDR=h", "MASTER_PORT: "),
            ("RANK=2 WORLD_SIZE=2 MASTER_ADDR=h MASTER_PORT=1", "RANK: "),
            ("RANK=x WORLD_SIZE=2", "RANK: "),
            ("RANK=0 WORLD_SIZE=2 MASTER_ADDR=h MASTER_PORT=70000", "MASTER_PORT: "),
            ("SLURM_PROCID=0 SLURM_STEP_ID=0", "SLURM_STEP_NUM_TASKS: "),
            ("SLURM_PROCID=0 SLURM_STEP_ID=0 SLURM_NTASKS=2", "SLURM_NODELIST: "),
            ("OMPI_COMM_WORLD_RANK=0 OMPI_COMM_WORLD_SIZE=2 OMPI_COMM_WORLD_LOCAL_SIZE=1", "MASTER_ADDR: "),
        ] {
            let error = place(variables).unwrap_err().to_string();
            assert!(error.starts_with(name), "{variables}: {error}");
        }
    }

    #[test]
    fn ranks_of_a_run_share_a_secret_and_a_port_that_other_runs_lack() {
        let of = |rank: usize, job: usize| {
            let variables =
                format!("SLURM_PROCID={rank} SLURM_NTASKS=2 SLURM_STEP_ID=0 SLURM_JOB_ID={job} SLURM_NODELIST=a,b");
            let place = place(&variables).unwrap().unwrap();
            (place.secret, place.ports)
        };
        assert_eq!(of(0, 7), of(1, 7));
        assert_ne!(of(0, 7).0, of(0, 8).0);
        assert_ne!(of(0, 7).1, of(0, 8).1);
    }

    #[test]
    fn where_a_secret_comes_from() {
        for (variables, is) in [
            ("RANK=0 WORLD_SIZE=2 MASTER_ADDR=h MASTER_PORT=7", "guessable"),
            ("RANK=0 WORLD_SIZE=2 MASTER_ADDR=h MASTER_PORT=7 LOCAL_WORLD_SIZE=1", "guessable"),
            ("RANK=0 WORLD_SIZE=2 MASTER_ADDR=h MASTER_PORT=7 LOCAL_WORLD_SIZE=2", "file"),
            ("RANK=0 WORLD_SIZE=2 MASTER_ADDR=127.0.0.2 MASTER_PORT=7", "file"),
            ("RANK=0 WORLD_SIZE=2 MASTER_ADDR=localhost MASTER_PORT=7 DPO_HOST_SECRET=s", "given"),
            ("RANK=0 WORLD_SIZE=2 MASTER_ADDR=h MASTER_PORT=7 DPO_HOST_SECRET=s", "given"),
            ("SLURM_PROCID=0 SLURM_NTASKS=2 SLURM_STEP_ID=0 SLURM_NODELIST=a,b SLURM_STEP_NUM_NODES=2", "guessable"),
            ("SLURM_PROCID=0 SLURM_NTASKS=2 SLURM_STEP_ID=0 SLURM_NODELIST=a SLURM_STEP_NUM_NODES=1", "file"),
            ("OMPI_COMM_WORLD_RANK=1 OMPI_COMM_WORLD_SIZE=2 OMPI_COMM_WORLD_LOCAL_SIZE=2", "file"),
        ] {
            let secret = match place(variables).unwrap().unwrap().secret {
                Source::Given(_) => "given",
                Source::Guessable(_) => "guessable",
                Source::File(_) => "file",
            };
            assert_eq!(secret, is, "{variables}");
        }
    }

    #[test]
    fn the_first_host_of_a_list() {
        for (nodes, first) in
            [("a", "a"), ("a,b", "a"), ("n[3-5,7]", "n3"), ("n[07,9],m1", "n07"), ("r[1-2]n[5-6]", "r1n5")]
        {
            assert_eq!(first_host(nodes).as_deref(), Some(first), "{nodes}");
        }
        assert_eq!([first_host(""), first_host("n["), first_host("n[]")], [None, None, None]);
    }
}
