# The broker alone, as docker-compose.yml runs it: one binary, an unprivileged user, a folder for its data.
FROM rust:1.95-bookworm AS build
WORKDIR /src
COPY . .
RUN cargo build --locked --release --bin countersign

FROM debian:bookworm-slim
# The keys of public issuers (GitHub, GitLab, most IdPs) are fetched over HTTPS, verified with the system's store.
RUN apt-get update && apt-get install -y --no-install-recommends ca-certificates && rm -rf /var/lib/apt/lists/*
# Who owns the data, and must be able to read what is mounted.
ARG BROKER_UID=10001
COPY --from=build /src/target/release/countersign /usr/local/bin/countersign
# A new volume takes over this folder's owner and mode.
RUN install -d -o $BROKER_UID -g $BROKER_UID -m 700 /var/lib/countersign
USER $BROKER_UID:$BROKER_UID
ENTRYPOINT ["countersign"]
