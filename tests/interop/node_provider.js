// SPDX-License-Identifier: Apache-2.0
// The real SOFA server of npm, without a registry: who announces it is its sidecar. Says "ready" when it listens.
'use strict';

const { RpcServer } = require('sofa-rpc-node').server;

const port = Number(process.argv[2]);
const server = new RpcServer({ logger: quiet(), port });
server.addService({ interfaceName: 'com.nodejs.Sum' }, {
  async plus(one, other) {
    return one + other;
  },
});
server.start().then(() => console.log('ready'));

function quiet() {
  return { debug() {}, error: console.error, info() {}, warn: console.error };
}
