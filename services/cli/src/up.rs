//! Starting the parts in order, serving until a signal, stopping in reverse.

use std::{net::SocketAddr, path::Path, sync::Arc, time::Instant};

use anyhow::{Context, Result, anyhow};
use kvasir_model::ModelFile;
use kvasir_router::Router;
use kvasir_runtime::{Runtime, admin::BindError, signals, telemetry};
use kvasir_store::Store;
use kvasir_worker::Worker;
use tokio_util::sync::CancellationToken;

use crate::{
    args::ServeArgs,
    output::{print, say},
    ready::{Part, Ready, ReadyFile, url},
    tree::{Configuration, Tree},
    version::VERSION,
};

/// Which parts a process runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Which {
    All,
    Store,
    Worker,
    Router,
}

impl Which {
    fn runs(self, part: Self) -> bool {
        self == Self::All || self == part
    }
}

/// Runs parts until Ctrl-C or SIGTERM.
pub(crate) fn serve(which: Which, configuration: Configuration, args: &ServeArgs) -> Result<()> {
    telemetry::init(&configuration.tree().log)?;
    let threads = crate::runtime()?;
    let served = threads.block_on(serve_on_threads(which, configuration, args.ready_file.as_deref()));
    // What is still on the threads now was cut by the parts' own stop; waiting for it would help no one.
    threads.shutdown_background();
    served
}

async fn serve_on_threads(which: Which, configuration: Configuration, ready_file: Option<&Path>) -> Result<()> {
    if let Some(path) = ready_file {
        ReadyFile::clear(path)?;
    }
    let stop = CancellationToken::new();
    signals::cancel_on_signals(stop.clone()).context("cannot watch for Ctrl-C and SIGTERM")?;
    let runtime = Runtime::new();
    let mut parts = Parts::default();
    let started = tokio::select! {
        biased;
        () = stop.cancelled() => None,
        started = parts.start(which, &configuration, &runtime) => Some(started),
    };
    let served = match started {
        // A signal while starting: what runs already is stopped below.
        None => Ok(()),
        Some(Err(error)) => Err(name_the_key(error, configuration.tree())),
        Some(Ok(())) => {
            let ready = parts.ready();
            // Said before the ready file is there: who waits for the file finds everything said.
            announce(&ready, &configuration, parts.chats());
            let file = ready_file.map(|path| ReadyFile::write(path, &ready)).transpose();
            if file.is_ok() {
                stop.cancelled().await;
            }
            file.map(drop)
        }
    };
    let stopped = parts.stop().await;
    served.and(stopped)
}

/// The parts that run in this process.
#[derive(Default)]
pub(crate) struct Parts {
    store: Option<Store>,
    worker: Option<Worker>,
    router: Option<Router>,
    model: Option<Arc<ModelFile>>,
}

impl Parts {
    /// Starts what is asked for, each part with the addresses of those before it. What was started before a failure is in
    /// `self` and to be stopped.
    async fn start(&mut self, which: Which, configuration: &Configuration, runtime: &Runtime) -> Result<()> {
        let tree = configuration.tree();
        // The model first: it is what is missing most often, and nothing needs undoing then.
        let file = match which.runs(Which::Worker) || which.runs(Which::Router) {
            true => Some(open_model(&tree.model.path).await?),
            false => None,
        };
        self.model.clone_from(&file);
        if which.runs(Which::Store) {
            let begun = Instant::now();
            self.store = Some(
                Store::start(&tree.store, runtime)
                    .await
                    .context("the store could not be started")?,
            );
            say(format_args!(
                "store ready after {:.1?}, data in {}",
                begun.elapsed(),
                tree.store.data_dir.display()
            ));
        }
        let store_addr = self.store.as_ref().map(Store::grpc_addr);
        if let Some(file) = file.as_ref().filter(|_| which.runs(Which::Worker)) {
            let begun = Instant::now();
            say(format_args!("loading the weights of {}", file.name()));
            let config = configuration.worker(store_addr);
            let worker = Worker::start(&config, Arc::clone(file), runtime)
                .await
                .context("the worker could not be started")?;
            self.worker = Some(worker);
            say(format_args!("worker ready after {:.1?}", begun.elapsed()));
        }
        if let Some(file) = file.filter(|_| which.runs(Which::Router)) {
            let config = configuration.router(store_addr, self.worker.as_ref().map(Worker::grpc_addr));
            self.router = Some(
                Router::start(&config, file, runtime)
                    .await
                    .context("the router could not be started")?,
            );
        }
        Ok(())
    }

    fn ready(&self) -> Ready {
        Ready {
            version: VERSION.to_owned(),
            pid: std::process::id(),
            model: self.model.as_ref().map(|file| file.name().to_owned()),
            store: self
                .store
                .as_ref()
                .map(|store| Part::new(store.grpc_addr(), store.admin_addr())),
            worker: self
                .worker
                .as_ref()
                .map(|worker| Part::new(worker.grpc_addr(), worker.admin_addr())),
            router: self.router.as_ref().map(|router| url(router.http_addr())),
        }
    }

    /// Whether the model has a template to chat by; base models have none.
    fn chats(&self) -> bool {
        self.model.as_ref().is_some_and(|file| file.template().is_some())
    }

    /// Router, worker, store: each finishes while what it needs still runs. A failure does not keep the rest from stopping.
    async fn stop(self) -> Result<()> {
        let mut failures = Vec::new();
        let mut note = |part: &str, result: Result<()>| {
            if let Err(error) = result {
                failures.push(format!("{part}: {error:#}"));
            }
        };
        if let Some(router) = self.router {
            note("router", router.stop().await);
        }
        if let Some(worker) = self.worker {
            note("worker", worker.stop().await);
        }
        if let Some(store) = self.store {
            note("store", store.stop().await);
        }
        if failures.is_empty() {
            say("stopped");
            return Ok(());
        }
        Err(anyhow!("stopped, but not in good order: {}", failures.join("; ")))
    }
}

/// Opens a model file off the async threads: its identity is the SHA-256 of all of it.
pub(crate) async fn open_model(path: &Path) -> Result<Arc<ModelFile>> {
    let owned = path.to_owned();
    tokio::task::spawn_blocking(move || open_model_blocking(&owned).map(Arc::new))
        .await
        .context("opening the model was cut short")?
}

/// Opens a model file, or says how to come by one.
pub(crate) fn open_model_blocking(path: &Path) -> Result<ModelFile> {
    if !path.exists() {
        return Err(anyhow!(
            "there is no model at {}: run `make model`, which fetches SmolLM2-135M-Instruct (98 MB) to where it is looked \
             for by itself, or name a GGUF file with --model FILE (model.path, KVASIR__MODEL__PATH)",
            path.display()
        ));
    }
    ModelFile::open(path).with_context(|| format!("cannot serve the model {} (model.path)", path.display()))
}

/// An address that cannot be listened on was configured somewhere: says under which key.
fn name_the_key(error: anyhow::Error, tree: &Tree) -> anyhow::Error {
    let Some(addr) = error
        .chain()
        .find_map(|cause| cause.downcast_ref::<BindError>())
        .map(|error| error.addr)
    else {
        return error;
    };
    let listens: [(&str, SocketAddr); 6] = [
        ("router.listen", tree.router.listen),
        ("worker.listen", tree.worker.listen),
        ("worker.admin_listen", tree.worker.admin_listen),
        ("store.listen", tree.store.listen),
        ("store.admin_listen", tree.store.admin_listen),
        ("store.bulk_listen", tree.store.bulk_listen),
    ];
    match listens.iter().find(|(_, listen)| *listen == addr) {
        Some((key, _)) => error.context(format!(
            "{key} = \"{addr}\" cannot be used (--set {key}=127.0.0.1:0 takes any free port)"
        )),
        None => error,
    }
}

/// Says on standard output what can be done now.
fn announce(ready: &Ready, configuration: &Configuration, chats: bool) {
    if let Some(router) = &ready.router {
        print(format_args!(
            "router  {router}  OpenAI API; /metrics, /healthz, /readyz"
        ));
    }
    if let Some(worker) = &ready.worker {
        print(format_args!("worker  {}  gRPC; {}/metrics", worker.grpc, worker.admin));
    }
    if let Some(store) = &ready.store {
        print(format_args!("store   {}  gRPC; {}/metrics", store.grpc, store.admin));
        print(format_args!(
            "data    {}",
            configuration.tree().store.data_dir.display()
        ));
    }
    if let (Some(router), Some(model)) = (&ready.router, &ready.model) {
        let (path, prompt) = match chats {
            true => (
                "chat/completions",
                r#""messages": [{"role": "user", "content": "Name three uses of a key-value cache."}]"#,
            ),
            false => ("completions", r#""prompt": "Three uses of a key-value cache are""#),
        };
        print(format_args!(
            "\ntry it:\n  curl -s {router}/v1/{path} -H 'content-type: application/json' -d '{{\"model\": \"{model}\", {prompt}, \
             \"max_tokens\": 48}}'\n"
        ));
    }
    print("Ctrl-C stops");
}
