use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus as Wire, health_client::HealthClient};

use super::*;

const ANY: &str = "127.0.0.1:0";

async fn health(addr: SocketAddr, service: &str) -> Result<Wire, tonic::Code> {
    let channel = tonic::transport::Endpoint::from_shared(format!("http://{addr}"))
        .expect("a url")
        .connect()
        .await;
    let mut client = HealthClient::new(channel.map_err(|_| tonic::Code::Unavailable)?);
    let reply = client
        .check(HealthCheckRequest {
            service: service.to_owned(),
        })
        .await
        .map_err(|status| status.code())?;
    Ok(reply.into_inner().status())
}

#[tokio::test]
async fn health_is_served_and_follows_the_state() {
    let server = GrpcServer {
        names: vec!["kvasir.v1.Any"],
        ..GrpcServer::new()
    };
    let running = server
        .serve(ANY.parse().expect("an address"), &CancellationToken::new())
        .await
        .expect("a port");
    let addr = running.addr();
    assert_eq!(health(addr, "kvasir.v1.Any").await, Ok(Wire::Serving));
    assert_eq!(health(addr, "").await, Ok(Wire::Serving));
    assert_eq!(health(addr, "kvasir.v1.Other").await, Err(tonic::Code::NotFound));
    running.set_serving(false).await;
    assert_eq!(health(addr, "kvasir.v1.Any").await, Ok(Wire::NotServing));
    running.stop().await;
    assert_eq!(health(addr, "").await, Err(tonic::Code::Unavailable));
}

#[tokio::test]
async fn cancelling_the_process_stops_the_server() {
    let shutdown = CancellationToken::new();
    let running = GrpcServer::new()
        .serve(ANY.parse().expect("an address"), &shutdown)
        .await
        .expect("a port");
    let addr = running.addr();
    assert_eq!(health(addr, "").await, Ok(Wire::Serving));
    shutdown.cancel();
    running.stop().await;
    assert_eq!(health(addr, "").await, Err(tonic::Code::Unavailable));
}

#[tokio::test]
async fn broken_descriptors_are_refused_with_advice() {
    let error = GrpcServer::new()
        .reflection(&[0xff, 0x01, 0x02])
        .expect_err("not a descriptor set");
    assert!(error.to_string().contains("rebuild kvasir-proto"), "{error}");
}

#[tokio::test]
async fn every_call_has_a_request_id() {
    let echo = tower::service_fn(|request: Request<()>| async move {
        Ok::<_, Infallible>(request.extensions().get::<RequestId>().cloned())
    });
    let service = RequestIdLayer.layer(echo);
    let given = Request::builder()
        .header("x-request-id", "abc-1")
        .body(())
        .expect("a request");
    let id = tower::ServiceExt::oneshot(service.clone(), given)
        .await
        .expect("an answer")
        .expect("an id");
    assert_eq!(id.as_str(), "abc-1");
    let made = tower::ServiceExt::oneshot(service, Request::new(()))
        .await
        .expect("an answer")
        .expect("an id");
    assert_eq!(made.as_str().len(), 32);
}
