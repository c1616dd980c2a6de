//! imago's asynchronous face: `--threads` threads, each with a runtime of its own; the requests in
//! flight are tasks spread over them, and share one image.
//!
//! The crate's file storage calls the kernel and waits inside its futures, so one thread has one
//! request at a time in the kernel whatever `-d` says; with as many threads as requests in flight
//! it has them all.

use std::fmt::Debug;
use std::process::ExitCode;
use std::sync::Arc;

use imago::file::File;
use imago::qcow2::Qcow2;
use imago::{FormatAccess, FormatDriverBuilder, PermissiveImplicitOpenGate, StorageOpenOptions};
use peer_common::{Buffer, Meter, Plan, Requests};
use tokio::runtime::{Builder, Runtime};
use tokio::task::{JoinSet, LocalSet};

fn main() -> ExitCode {
    peer_common::main(true, run)
}

fn run(plan: Plan) -> Result<(), String> {
    let runtime = runtime()?;
    let image = runtime.block_on(open(&plan))?;
    let requests = Arc::new(Requests::of(&plan));
    let mut meter = Meter::begin();
    let threads: Vec<_> = (0..plan.threads)
        .map(|number| {
            let (plan, image, requests) = (plan.clone(), image.clone(), requests.clone());
            std::thread::spawn(move || one_thread(number, &plan, &image, &requests))
        })
        .collect();
    for thread in threads {
        thread.join().map_err(|_| "a thread panicked")??;
    }
    meter.requests_done();
    if plan.write {
        runtime.block_on(async {
            image.flush().await.map_err(failed("flush"))?;
            image.sync().await.map_err(failed("sync"))
        })?;
    }
    meter.print(&plan);
    Ok(())
}

async fn open(plan: &Plan) -> Result<Arc<FormatAccess<File>>, String> {
    let image = Qcow2::<File>::builder_path(&plan.image)
        .storage_open_options(StorageOpenOptions::new().direct(plan.direct))
        .write(plan.write)
        .open(PermissiveImplicitOpenGate::default())
        .await
        .map_err(failed("open"))?;
    Ok(Arc::new(FormatAccess::new(image)))
}

/// This thread's share of the requests in flight.
fn one_thread(
    number: usize,
    plan: &Plan,
    image: &Arc<FormatAccess<File>>,
    requests: &Arc<Requests>,
) -> Result<(), String> {
    let share = plan.depth / plan.threads + usize::from(number < plan.depth % plan.threads);
    LocalSet::new().block_on(&runtime()?, async {
        let mut tasks = JoinSet::new();
        for _ in 0..share {
            let (plan, image, requests) = (plan.clone(), image.clone(), requests.clone());
            tasks.spawn_local(async move {
                let mut buffer = Buffer::new(plan.size, plan.pattern);
                while let Some(index) = requests.take() {
                    let offset = plan.offset_of(index, image.size());
                    if plan.write {
                        let written = image.write(buffer.bytes(), offset).await;
                        written.map_err(failed("write"))?;
                    } else {
                        let read = image.read(buffer.bytes_mut(), offset).await;
                        read.map_err(failed("read"))?;
                    }
                }
                Ok::<(), String>(())
            });
        }
        while let Some(ended) = tasks.join_next().await {
            ended.map_err(failed("task"))??;
        }
        Ok(())
    })
}

fn runtime() -> Result<Runtime, String> {
    let runtime = Builder::new_current_thread().build();
    runtime.map_err(failed("runtime"))
}

fn failed<E: Debug>(what: &'static str) -> impl Fn(E) -> String {
    move |error| format!("{what}: {error:?}")
}
