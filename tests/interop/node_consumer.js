// SPDX-License-Identifier: Apache-2.0
// The real SOFA client of npm, as consumer: it finds its providers in the registry, as it always did.
'use strict';

const { RpcClient } = require('sofa-rpc-node').client;
const { ZookeeperRegistry } = require('sofa-rpc-node').registry;

const logger = { debug() {}, error: console.error, info() {}, warn: console.error };

async function main() {
  const registry = new ZookeeperRegistry({ logger, address: process.argv[2] });
  await registry.ready();
  const client = new RpcClient({ logger, registry });
  const consumer = client.createConsumer({ interfaceName: 'com.nodejs.Sum' });
  await consumer.ready();
  for (let number = 0; number < 50; number++) {
    const sum = await consumer.invoke('plus', [ number, 1 ], { responseTimeout: 5000 });
    if (sum !== number + 1) throw new Error(`${number} + 1 is not ${sum}`);
  }
  console.log('sofa-rpc-node: found its provider in the registry, 50 calls');
}

main().then(() => process.exit(0), error => {
  console.error(error);
  process.exit(1);
});
