// SPDX-License-Identifier: Apache-2.0
// The real SOFA server of npm: on this port, and with this registry, if one is named. Without it, who announces the
// server is its sidecar. Says "ready" when it listens, "published" when it has found itself in the registry.
'use strict';

const { RpcServer } = require('sofa-rpc-node').server;
const { ZookeeperRegistry } = require('sofa-rpc-node').registry;

const [ port, address ] = process.argv.slice(2);
const logger = { debug() {}, error: console.error, info() {}, warn: console.error };

async function main() {
  const registry = address && new ZookeeperRegistry({ logger, address });
  if (registry) await registry.ready();
  const server = new RpcServer({ logger, port: Number(port), publishAddress: '10.99.0.1', registry });
  server.addService({ interfaceName: 'com.nodejs.Sum' }, {
    async plus(one, other) {
      return one + other;
    },
  });
  await server.start();
  console.log('ready');
  if (!registry) return;
  await server.publish();
  console.log('published');
  process.once('SIGTERM', () => server.unPublish().then(() => process.exit(0)));
}

main().catch(error => {
  console.error(error);
  process.exit(1);
});
