//! qcow2-rs on its tokio-uring back end: one thread, a task for each request in flight.

use std::fmt::Debug;
use std::process::ExitCode;
use std::rc::Rc;

use peer_common::{Buffer, Meter, Plan, Requests};
use qcow2_rs::dev::Qcow2DevParams;
use qcow2_rs::utils::qcow2_setup_dev_uring;

fn main() -> ExitCode {
    peer_common::main(false, |plan| tokio_uring::start(run(plan)))
}

async fn run(plan: Plan) -> Result<(), String> {
    // Blocks of 512 bytes; cache sizes by default.
    let params = Qcow2DevParams::new(9, None, None, !plan.write, plan.direct);
    let image = qcow2_setup_dev_uring(&plan.image, &params)
        .await
        .map_err(failed("open"))?;
    let image = Rc::new(image);
    let disk = image.info.virtual_size();
    let requests = Rc::new(Requests::of(&plan));
    let mut meter = Meter::begin();
    let mut tasks = Vec::new();
    for _ in 0..plan.depth {
        let (plan, image, requests) = (plan.clone(), image.clone(), requests.clone());
        tasks.push(tokio_uring::spawn(async move {
            let mut buffer = Buffer::new(plan.size, plan.pattern);
            while let Some(index) = requests.take() {
                let offset = plan.offset_of(index, disk);
                if plan.write {
                    let written = image.write_at(buffer.bytes(), offset).await;
                    written.map_err(failed("write"))?;
                } else {
                    let read = image.read_at(buffer.bytes_mut(), offset).await;
                    let read = read.map_err(failed("read"))?;
                    if read != plan.size {
                        return Err(format!("{read} bytes read at {offset}"));
                    }
                }
            }
            Ok(())
        }));
    }
    for task in tasks {
        task.await.map_err(failed("task"))??;
    }
    meter.requests_done();
    if plan.write {
        image.flush_meta().await.map_err(failed("flush"))?;
        let synced = image.fsync_range(0, usize::MAX).await;
        synced.map_err(failed("sync"))?;
    }
    meter.print(&plan);
    Ok(())
}

fn failed<E: Debug>(what: &'static str) -> impl Fn(E) -> String {
    move |error| format!("{what}: {error:?}")
}
